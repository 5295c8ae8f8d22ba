// Line differences: patience where lines stand once in both texts, a longest common subsequence in between.

const DIFF_LINES = 8000; // of each text
const DIFF_CELLS = 2e6; // of a table of the longest common subsequence

/** The differences of two lists of lines as [sign, line]; sign is " ", "-" or "+". */
function diffLines(a, b) {
  const out = [];
  const put = (sign, lines) => lines.forEach((line) => out.push([sign, line]));
  // Parts still to compare, the next one last: lines [a0, a1) of the first text, [b0, b1) of the second.
  const todo = [[0, a.length, 0, b.length]];
  while (todo.length) {
    let [a0, a1, b0, b1] = todo.pop();
    const start = a0;
    while (a0 < a1 && b0 < b1 && a[a0] === b[b0]) [a0, b0] = [a0 + 1, b0 + 1];
    put(" ", a.slice(start, a0));
    let tail = 0;
    while (a0 < a1 - tail && b0 < b1 - tail && a[a1 - 1 - tail] === b[b1 - 1 - tail]) tail += 1;
    if (tail) todo.push([a1 - tail, a1, b1 - tail, b1]);
    [a1, b1] = [a1 - tail, b1 - tail];
    const pairs = anchors(a, b, [a0, a1, b0, b1]);
    if (pairs.length) {
      const cuts = [...pairs, [a1, b1]].map(([i, j], k) => {
        const [x, y] = k ? pairs[k - 1] : [a0, b0];
        return [x, i, y, j];
      });
      todo.push(...cuts.reverse());
    } else {
      common(a.slice(a0, a1), b.slice(b0, b1), put);
    }
  }
  return out;
}

/** Pairs of equal lines that stand once in each part, as many as rise in both. */
function anchors(a, b, [a0, a1, b0, b1]) {
  const once = (lines, from, to) => {
    const at = new Map();
    for (let i = from; i < to; i += 1) at.set(lines[i], at.has(lines[i]) ? -1 : i);
    return at;
  };
  const there = once(b, b0, b1);
  const pairs = [...once(a, a0, a1)]
    .map(([line, i]) => [i, there.has(line) ? there.get(line) : -1])
    .filter(([i, j]) => i >= 0 && j >= 0)
    .sort((x, y) => x[0] - y[0]);
  // The longest rising sequence: piles of a game of patience, each card knows the one left of it.
  const piles = [];
  pairs.forEach((pair) => {
    let [low, high] = [0, piles.length];
    while (low < high) {
      const mid = (low + high) >> 1;
      if (piles[mid].pair[1] < pair[1]) low = mid + 1;
      else high = mid;
    }
    piles[low] = { pair, left: low ? piles[low - 1] : null };
  });
  const rising = [];
  for (let card = piles[piles.length - 1]; card; card = card.left) rising.push(card.pair);
  return rising.reverse();
}

/** The longest common subsequence of short parts; of long ones all lines change. */
function common(a, b, put) {
  const wide = b.length + 1;
  if (!a.length || !b.length || (a.length + 1) * wide > DIFF_CELLS) {
    put("-", a);
    put("+", b);
    return;
  }
  const best = new Uint32Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      best[i * wide + j] =
        a[i] === b[j]
          ? 1 + best[(i + 1) * wide + j + 1]
          : Math.max(best[(i + 1) * wide + j], best[i * wide + j + 1]);
    }
  }
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      put(" ", [a[i]]);
      [i, j] = [i + 1, j + 1];
    } else if (best[(i + 1) * wide + j] >= best[i * wide + j + 1]) {
      put("-", [a[i]]);
      i += 1;
    } else {
      put("+", [b[j]]);
      j += 1;
    }
  }
  put("-", a.slice(i));
  put("+", b.slice(j));
}
