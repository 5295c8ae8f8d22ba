// The head of the page, the player, the keys, and the start.

function renderHead() {
  const cells = G.layers * G.segments;
  $("title").textContent = V.title;
  const together =
    maxWidth > 1
      ? `Cells of one level run together: up to <b>${maxWidth}</b> at once, <b>${count(G.levels, "step")}</b> instead of ${cells.toLocaleString("en")}.`
      : "No two cells can run together, so they run one after the other.";
  const later = G.offsets
    .map((o, i) => [o, G.readers[i]])
    .filter(([o]) => o[0] > 0)
    .map(([o, layers]) => {
      const names = carriesOf(o).map((c) => `<code>${esc(c.name)}</code>`);
      const shown = names.length > 4 ? [...names.slice(0, 3), `${names.length - 3} more`] : names;
      const what = listed(shown) || "a value";
      const way = [...new Set(carriesOf(o).map((c) => c.through))].filter(Boolean);
      const through = way.length ? ` (through ${esc(listed(way))})` : "";
      if (layers.length !== 1) return `a cell hands on ${what} to ${whereTo(o)}${through}`;
      const segment = o[0] === 1 ? "the next segment" : `the segment ${o[0]} later`;
      return `layer ${layers[0] - o[1]} hands on ${what} to layer ${layers[0]} of ${segment}${through}`;
    });
  const carry = later.length
    ? ` From segment to segment ${listed(later)}.`
    : " Nothing flows from one segment to the next.";
  $("lead").innerHTML = `A cell is one layer on one segment. ${together}${bandsLead()}${carry}${timeLead()}`;
  const tiles = [
    ["cells", `${cells.toLocaleString("en")} <small>${G.layers} × ${G.segments}</small>`],
    [`level = ${G.rule}`, `${count(G.levels, "level")}`],
    ["run together", `${maxWidth} <small>${(cells / G.levels).toFixed(1)} on average</small>`],
  ];
  if (G.bands.length > 1) tiles.push(["bands", `${G.bands.length} <small>${G.bands.map(bandLayers).join(", ")}</small>`]);
  if (G.carries.length) tiles.push(["carried", bytes(sum(G.carries.map((c) => c.total)))]);
  if (V.profile) {
    const total = totalTime();
    const gain = V.profile.sequentialUs
      ? ` <small>${speed(total, V.profile.sequentialUs)}</small>`
      : "";
    tiles.push(["a call, measured", `${micros(total)}${gain}`]);
  }
  V.facts.forEach(([name, value]) => tiles.push([esc(name), esc(value)]));
  $("tiles").innerHTML = tiles
    .map(([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`)
    .join("");
  if (G.blocked) {
    $("banner").hidden = false;
    $("banner").innerHTML = `<p>Why no two cells can run together: ${esc(G.blocked)}.</p>`;
  } else if (G.levels > G.criticalPath) {
    $("banner").hidden = false;
    $("banner").innerHTML =
      `<p>The dependences alone would allow ${count(G.criticalPath, "level")}; this schedule has ${G.levels}${G.block < G.segments ? `: at most ${count(G.block, "segment")} run together, so that memory does not grow with the text` : ""}.</p>`;
  }
  const swatch = (bg, text) => `<li><i style="background:var(${bg})"></i>${text}</li>`;
  const phases = Object.keys(G.phases).filter((p) => G.phases[p][1] > G.phases[p][0]);
  $("legend").innerHTML =
    phases
      .map((p) =>
        swatch(PHASE_COLOURS[p], `${PHASE_WORDS[p]} (${count(G.phases[p][1] - G.phases[p][0], "level")})`),
      )
      .join("") +
    `<li><i class="thin" style="background:var(--steady-bg)"></i>done</li>` +
    swatch("--later", "to run") +
    (kinds.length > 1
      ? `<li title="${esc(kinds.map((k, i) => `${String.fromCharCode(65 + (i % 26))}: ${k}`).join(", "))}"><b>A</b>, <b>B</b> … kinds of layers: one grouped call each</li>`
      : "") +
    `<li><i class="arrow" style="background:var(--in)"></i>it waits for</li><li><i class="arrow" style="background:var(--out)"></i>it feeds</li>`;
}

/** Where the time goes, in one sentence. */
function timeLead() {
  if (!V.profile) return "";
  const total = totalTime(),
    [phase, took] = phaseTimes().reduce((a, b) => (b[1] > a[1] ? b : a)),
    kind = kindTimes()[0];
  const share = phaseTimes().length > 1 ? `, ${percent(took, total)} of it in the ${PHASE_WORDS[phase]}` : "";
  const most = kind
    ? `; of the time in operations most goes to ${esc(kind[0])} (${percent(kind[1], sum(kindTimes().map((k) => k[1])))})`
    : "";
  return ` A call takes <b>${micros(total)}</b>${share}${most}.`;
}

function renderNow() {
  const t = state.level,
    cells = cellsOf(t),
    phase = phaseOf(t);
  const layers = cells.map((c) => c[1]).sort((a, b) => a - b),
    segments = cells.map((c) => c[0]);
  const calls = callsOf(t) > 1 ? `, in ${callsOf(t)} grouped calls` : "";
  const alone = cells.length === 1 ? "1 cell runs" : `<b>${cells.length} cells run together</b>${calls}`;
  const took = V.profile ? `, ${micros(V.profile.levelUs[t])}` : "";
  const ls = [...new Set(layers)];
  $("now").innerHTML =
    `<b>Level ${t}</b> <span class="phase ${phase}">${PHASE_WORDS[phase]}</span> ${alone}: ` +
    `layer${ls.length > 1 ? "s" : ""} ${spans(ls)} on segment${segments.length > 1 ? "s" : ""} ${spans(segments)}${took}`;
  $("slider").value = t;
  $("slider").setAttribute(
    "aria-valuetext",
    `level ${t} of ${G.levels - 1}, ${PHASE_WORDS[phase]}, ${count(cells.length, "cell")}`,
  );
  $("levelno").textContent = `${t} / ${G.levels - 1}`;
  document.body.dataset.level = t;
}

// -- the player

let timer = 0;
function play(on) {
  state.playing = on;
  clearTimeout(timer);
  $("play").setAttribute("aria-pressed", on);
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  $("playicon").setAttribute("d", on ? "M4 3h3v10H4zM9 3h3v10H9z" : "M4 2.5v11l9-5.5z");
  if (!on) return;
  if (state.level >= G.levels - 1) setLevel(0);
  // The whole walk takes about ten seconds, whatever the number of levels.
  const pause = () => Math.max(30, Math.min(700, 10000 / G.levels)) / Number($("speed").value);
  const tick = () => {
    if (state.level >= G.levels - 1) {
      play(false);
      return;
    }
    setLevel(state.level + 1);
    timer = setTimeout(tick, pause());
  };
  timer = setTimeout(tick, pause());
}

function initKeys() {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  $("grid").addEventListener("keydown", (e) => {
    const move = moves[e.key];
    if (!move || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    const far = e.shiftKey ? 8 : 1;
    const clamp = (v, n) => Math.max(0, Math.min(n - 1, v));
    setCell([
      clamp(state.cell[0] + far * move[0], G.segments),
      clamp(state.cell[1] + far * move[1], G.layers),
    ]);
    const [s, l] = state.cell,
      t = levelOf(state.cell);
    const names = (sign) =>
      linked(state.cell, sign)
        .map(([c]) => pair(c))
        .join(" ") || "nothing";
    $("say").textContent =
      `segment ${s}, layer ${l}, level ${t}, with ${widths[t] - 1} others. Waits for ${names(-1)}. Feeds ${names(1)}.`;
  });
  document.addEventListener("keydown", (e) => {
    const at = e.target,
      typing = at.matches("input[type=search], select");
    if (typing || e.ctrlKey || e.metaKey || e.altKey) return;
    const steps = { ",": -1, ".": 1 };
    if (e.key === " " && !at.matches("button, input, .code")) play(!state.playing);
    else if (e.key in steps) {
      play(false);
      setLevel(state.level + steps[e.key]);
    } else if (e.key === "Home" && !at.matches(".code")) setLevel(0);
    else if (e.key === "End" && !at.matches(".code")) setLevel(G.levels - 1);
    else return;
    e.preventDefault();
  });
}

function initPlayer() {
  $("slider").max = G.levels - 1;
  $("slider").addEventListener("input", () => {
    play(false);
    setLevel(Number($("slider").value));
  });
  $("play").addEventListener("click", () => play(!state.playing));
  $("first").addEventListener("click", () => {
    play(false);
    setLevel(0);
  });
  $("back").addEventListener("click", () => {
    play(false);
    setLevel(state.level - 1);
  });
  $("next").addEventListener("click", () => {
    play(false);
    setLevel(state.level + 1);
  });
  watch((what) => {
    if (what === "level") renderNow();
  });
}

readPalette();
// Open on the first level at full width: it shows at once what runs together.
state.level = widths.indexOf(maxWidth);
state.cell = cellsOf(state.level)[Math.floor(maxWidth / 2)];
renderHead();
initPlayer();
initGrid();
initCell();
initTabs();
initKeys();
initLinks();
renderNow();
keepInSight();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readPalette();
  changed("theme");
});
document.body.dataset.ready = "1";
