#!/usr/bin/env bash
# One call on a GPU, under nine minutes: build, check, time; short tables last, everything else in a folder.
#
#   benchmarks/gpu_session.sh PART FOLDER [more flags of `rmtcompile bench`]
#
# PART   quick         two lengths, errors, profile
#        main          the table of the 1B model: four lengths, all opponents, errors, profile
#        segments      segments of 512, 256 and 128 at 131,072 tokens against sequential in CUDA graphs
#        longsegments  segments of 2048 and 4096
#        shapes        160M, 3B and 8B
#        batches       two and four inputs at once
#        accumulation  errors along 131,072 tokens, wavefronts by width
#        compile       the first call, with no compiled code on disk and then with it
# FOLDER gets PART*.json, PART*.txt (tables), PART*.log (progress, tracebacks) and plots.
set -uo pipefail
part=${1:?which part}
folder=${2:?where to}
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python=${PYTHON:-python3}
begun=$SECONDS
status=0

bench() { # NAME FLAGS...: the tables on stdout, the progress in NAME.log; stopped, with its tables, when time is up
    local name=$1 left=$((535 - SECONDS + begun))
    shift
    if ((left < 30)); then
        echo "$name: not begun, the time is up"
        status=1
        return
    fi
    timeout -s INT -k 10 "$left" "$python" -m rmtcompile.bench --budget $((left > 120 ? left - 90 : left / 2)) \
        --out "$folder/$name.json" --plots "$folder/$name-plots" "$@" \
        2>"$folder/$name.log" | tee "$folder/$name.txt"
    local rc=${PIPESTATUS[0]}
    if ((rc)); then
        status=1
        echo "$name: exit $rc; the end of $name.log:"
        tail -n 25 "$folder/$name.log"
    fi
}

case $part in
quick) bench quick --tokens 4096 8192 --rounds 3 --errors --profile "$@" ;;
main) bench main --tokens 4096 8192 32768 131072 --errors --profile "$@" ;;
segments) bench segments --segment 512 256 128 --tokens 131072 --opponents graphed diagonal --rounds 4 "$@" ;;
longsegments) bench longsegments --segment 2048 4096 --tokens 32768 --opponents graphed diagonal --rounds 4 "$@" ;;
shapes)
    for preset in 160m 3b 8b; do
        bench "shapes-$preset" --preset "$preset" --tokens 8192 32768 --opponents graphed diagonal --rounds 3 "$@"
    done
    ;;
batches)
    for batch in 2 4; do
        bench "batches-$batch" --batch "$batch" --tokens 4096 32768 --opponents graphed diagonal --rounds 3 "$@"
    done
    ;;
accumulation)
    bench accumulation --tokens 4096 --opponents sequential diagonal --rounds 2 --accumulation 131072 --wavefronts "$@"
    ;;
compile)
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) && export TORCHINDUCTOR_CACHE_DIR
    bench compile-cold --tokens 4096 --opponents diagonal --rounds 1 "$@"
    bench compile-warm --tokens 4096 --opponents diagonal --rounds 1 "$@"
    rm -rf "$TORCHINDUCTOR_CACHE_DIR"
    ;;
*)
    echo "no part is called $part" >&2
    exit 2
    ;;
esac
echo "$part: $((SECONDS - begun)) s, exit $status"
exit $status
