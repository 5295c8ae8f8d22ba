// The data, the state that everything draws from, words, and small helpers.

const V = JSON.parse(document.getElementById("data").textContent);
const G = V.schedule;
const $ = (id) => document.getElementById(id);
const PHASE_WORDS = { ramp_up: "ramp-up", steady: "steady state", ramp_down: "ramp-down" };
const PHASE_COLOURS = { ramp_up: "--up", steady: "--steady", ramp_down: "--down" };

const state = {
  level: 0,
  cell: [0, 0],
  hover: null,
  playing: false,
  tab: null,
  filter: "",
  pass: null, // the pass whose text is open, and the one it is compared with
  from: null,
};
const watchers = [];
/** Call `fn(what)` after each change of state; `what` is "level", "cell", "hover", "tab", "pass", "filter" or "theme". */
const watch = (fn) => watchers.push(fn);
const changed = (what) => watchers.forEach((fn) => fn(what));

const levelOf = ([s, l]) => (G.alpha ? G.alpha * s + l : Math.floor(s / G.block) * G.layers + l);
const inGrid = ([s, l]) => s >= 0 && s < G.segments && l >= 0 && l < G.layers;
const phaseOf = (t) => Object.keys(G.phases).find((p) => t >= G.phases[p][0] && t < G.phases[p][1]);
const same = (a, b) => a && b && a[0] === b[0] && a[1] === b[1];

/** The cells of level t, segments ascending: `alpha * s + l = t`. */
function cellsOf(t) {
  if (G.alpha === 0) {
    const first = Math.floor(t / G.layers) * G.block;
    return Array.from({ length: Math.min(G.block, G.segments - first) }, (_, i) => [first + i, t % G.layers]);
  }
  const low = Math.max(0, Math.ceil((t - G.layers + 1) / G.alpha));
  const high = Math.min(G.segments - 1, Math.floor(t / G.alpha));
  return Array.from({ length: Math.max(0, high - low + 1) }, (_, i) => [low + i, t - G.alpha * (low + i)]);
}
const widths = Array.from({ length: G.levels }, (_, t) => cellsOf(t).length);
const maxWidth = Math.max(...widths);

const readers = G.readers.map((layers) => new Set(layers));
/** The dependences of a cell as [cell, offset]; `sign` -1: what it waits for, +1: what waits for it. */
const linked = (cell, sign) =>
  G.offsets
    .map(([ds, dl], i) => [[cell[0] + sign * ds, cell[1] + sign * dl], [ds, dl], i])
    .filter(([other, , i]) => inGrid(other) && readers[i].has(sign < 0 ? cell[1] : other[1]));
const carriesOf = (offset) => G.carries.filter((c) => same(c.offset, offset));
/** What a cell hands on by an offset, by name. */
const handedOn = (writer, offset) =>
  carriesOf(offset)
    .filter((c) => c.layers.includes(writer[1]))
    .map((c) => c.name);
/** Kinds of layers: only layers of one kind share a grouped call. */
const kinds = [...new Set(G.kinds)];
const kindLetter = (l) => String.fromCharCode(65 + (kinds.indexOf(G.kinds[l]) % 26));
const callsOf = (t) => new Set(cellsOf(t).map(([, l]) => G.kinds[l])).size;

// -- words

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const pair = ([a, b]) => `(${a},${b})`;
const esc = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const bytes = (n) => {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let i = 0;
  while (n >= 1024 && i < 3) {
    n /= 1024;
    i += 1;
  }
  return `${i === 0 || n >= 100 ? Math.round(n) : n.toFixed(1).replace(/\.0$/, "")} ${units[i]}`;
};
const micros = (us) => {
  const [value, unit] = us >= 1e6 ? [us / 1e6, "s"] : us >= 1000 ? [us / 1000, "ms"] : [us, "µs"];
  return `${Number(value.toPrecision(value >= 100 ? Math.ceil(Math.log10(value + 1)) : 3))}\u00a0${unit}`;
};
const percent = (part, whole) => {
  const share = whole ? (100 * part) / whole : 0;
  return `${share < 10 ? share.toFixed(1) : Math.round(share)} %`;
};
/** Numbers as spans: [0,1,2,5] -> "0–2, 5". */
function spans(numbers) {
  const out = [];
  numbers.forEach((n) => {
    const last = out[out.length - 1];
    if (last && n === last[1] + 1) last[1] = n;
    else out.push([n, n]);
  });
  const words = out.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`));
  return words.length > 4 ? `${words[0]}, ${words[1]} … ${words[words.length - 1]}` : words.join(", ");
}
/** Where the producer of an offset stands, seen from the consumer. */
function whereFrom([ds, dl]) {
  const segment = ds === 0 ? "same segment" : ds === 1 ? "previous segment" : `${ds} segments earlier`;
  const layer =
    dl === 0
      ? "same layer"
      : `${Math.abs(dl) === 1 ? "the layer" : count(Math.abs(dl), "layer")} ${dl > 0 ? "below" : "above"}`;
  return `${layer}, ${segment}`;
}
function whereTo([ds, dl]) {
  const segment = ds === 0 ? "the same segment" : ds === 1 ? "the next segment" : `the segment ${ds} later`;
  if (dl === 0) return `the same layer of ${segment}`;
  const layer = Math.abs(dl) === 1 ? "the layer" : count(Math.abs(dl), "layer");
  return `${layer} ${dl > 0 ? "above" : "below"}, in ${segment}`;
}
const layerWords = (layers) =>
  layers.length === G.layers ? "every layer" : `layer${layers.length === 1 ? "" : "s"} ${spans(layers)}`;
/** A measured time against the model's own: "1.6× as fast as". */
const speed = (ours, theirs) => `${(theirs / ours).toFixed(2)}× as fast as the model's own forward`;

const listed = (items) =>
  items.length > 1 ? `${items.slice(0, -1).join(", ")} and ${items[items.length - 1]}` : items.join("");

// -- drawing

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let palette = {};
function readPalette() {
  const names = [
    "up",
    "up-bg",
    "steady",
    "steady-bg",
    "down",
    "down-bg",
    "later",
    "later-line",
    "number",
    "select",
    "in",
    "out",
    "soft",
    "ink",
    "card",
    "accent",
    "line",
  ];
  palette = Object.fromEntries(names.map((n) => [n, css(`--${n}`)]));
}
const phaseColour = (phase, weak) => palette[PHASE_COLOURS[phase].slice(2) + (weak ? "-bg" : "")];

/** A canvas of w x h CSS pixels, sharp on dense screens; gives its context, cleared. */
function sized(canvas, w, h) {
  const dense = Math.min(window.devicePixelRatio || 1, 2);
  const [pw, ph] = [Math.round(w * dense), Math.round(h * dense)];
  if (canvas.width !== pw || canvas.height !== ph) {
    canvas.width = pw;
    canvas.height = ph;
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(dense, 0, 0, dense, 0, 0);
  ctx.clearRect(0, 0, w, h);
  return ctx;
}

// -- changes of state

function setLevel(t) {
  const level = Math.max(0, Math.min(G.levels - 1, Math.round(t)));
  if (level === state.level) return;
  state.level = level;
  changed("level");
}
function setCell(cell, { follow = true } = {}) {
  if (!inGrid(cell)) return;
  state.cell = cell;
  changed("cell");
  if (follow) setLevel(levelOf(cell));
}
function setTab(id) {
  if (id === state.tab || !$(`tab-${id}`)) return;
  state.tab = id;
  changed("tab");
}
function setPasses(pass, from) {
  state.pass = pass;
  state.from = from;
  changed("pass");
}
function setFilter(text) {
  if (text === state.filter) return;
  state.filter = text;
  changed("filter");
}
function setHover(cell) {
  if (same(cell, state.hover) || (!cell && !state.hover)) return;
  state.hover = cell;
  changed("hover");
}
