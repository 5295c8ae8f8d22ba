// Memory: the bytes that are alive between cells, by level, and what grows with the number of segments.

const M = V.memory;
const hasBytes = M.carried.some((n) => n > 0) || M.values.some((n) => n > 0);
const PLOT = { wide: 640, high: 210, left: 74, top: 10, right: 12, bottom: 34 };

/** A plot as SVG: lines or areas over whole numbers, with words on both axes. */
function plotHtml({ id, label, xs, series, shown, under, stacked = false }) {
  const { wide, high, left, top, right, bottom } = PLOT;
  const sums = xs.map((_, i) => series.map((one) => one.ys[i]));
  const tops = sums.map((ys) => (stacked ? sum(ys) : Math.max(...ys)));
  const most = Math.max(1, ...tops),
    last = Math.max(xs[xs.length - 1], xs[0] + 1);
  const x = (v) => left + ((v - xs[0]) / (last - xs[0])) * (wide - left - right);
  const y = (v) => high - bottom - (v / most) * (high - bottom - top);
  const at = (i, v) => `${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`;
  const below = xs.map(() => 0);
  const shapes = series.map(({ ys, colour, dashed }) => {
    const from = below.slice();
    if (stacked) ys.forEach((v, i) => (below[i] += v));
    const upper = ys.map((v, i) => at(i, stacked ? below[i] : v));
    if (!stacked)
      return `<path class="curve" d="M${upper.join("L")}" stroke="var(${colour})"${dashed ? ` stroke-dasharray="5 4"` : ""}/>`;
    const lower = from.map((v, i) => at(i, v)).reverse();
    return `<path d="M${upper.join("L")}L${lower.join("L")}z" fill="var(${colour})" opacity=".75"/>`;
  });
  const lines = [0, 0.5, 1].map(
    (f) =>
      `<path class="rule" d="M${left} ${y(f * most)}H${wide - right}"/><text x="${left - 8}" y="${y(f * most) + 4}" text-anchor="end">${f ? esc(shown(f * most)) : 0}</text>`,
  );
  const step = niceStep((last - xs[0]) / 8),
    ticks = [];
  for (let v = Math.ceil(xs[0] / step) * step; v <= last; v += step)
    ticks.push(`<text x="${x(v)}" y="${high - bottom + 15}" text-anchor="middle">${v}</text>`);
  return (
    `<svg class="plot" id="${id}" viewBox="0 0 ${wide} ${high}" role="img" aria-label="${esc(label)}" data-x0="${x(xs[0])}" data-x1="${x(last)}">` +
    `${lines.join("")}${shapes.join("")}${ticks.join("")}<path class="cursor" d=""/>` +
    `<text x="${(left + wide - right) / 2}" y="${high - 4}" text-anchor="middle">${esc(under)}</text></svg>`
  );
}

const keyHtml = (series) =>
  `<ul class="legend">${series.map(({ name, colour }) => `<li><i style="background:var(${colour})"></i>${esc(name)}</li>`).join("")}</ul>`;

function initMemory(panel) {
  const levels = M.carried.map((_, t) => t);
  const kept = [
    { name: "carried from segment to segment", ys: M.carried, colour: "--accent" },
    { name: "handed on within a segment", ys: M.values, colour: "--up" },
  ].filter((one) => one.ys.some((n) => n > 0));
  const steps = [
    { name: `levels (level = ${G.rule})`, ys: M.levels, colour: "--steady" },
    { name: "cells, one after the other", ys: M.segments.map((n) => n * G.layers), colour: "--down", dashed: true },
  ];
  const peaks = [
    { name: "carried from segment to segment", ys: M.carriedAt, colour: "--accent" },
    { name: "handed on within a segment", ys: M.valuesAt, colour: "--up" },
  ].filter((one) => one.ys.some((n) => n > 0));
  const alive = hasBytes
    ? `<h2>Alive between cells, by level</h2><p class="quiet">A value counts from the level that writes it to the last level that reads it, both included. What cells need inside, results, and weights do not count.</p>` +
      plotHtml({ id: "plot-alive", label: "Bytes alive by level", xs: levels, series: kept, shown: bytes, under: "level", stacked: true }) +
      `${keyHtml(kept)}<p class="quiet" id="alive-now"></p>`
    : `<h2>Alive between cells</h2><p class="quiet">This file knows no sizes of values that go from cell to cell.</p>`;
  const longest = M.segments.length - 1;
  panel.innerHTML =
    `<div class="plots"><div>${alive}</div><div><h2>Longer texts: levels</h2><p class="quiet">By the same rule: ${count(M.segments[longest], "segment")} of ${count(G.layers, "layer")} take ${count(M.levels[longest], "level")} instead of ${(M.segments[longest] * G.layers).toLocaleString("en")} steps.</p>` +
    plotHtml({ id: "plot-levels", label: "Levels by number of segments", xs: M.segments, series: steps, shown: (n) => Math.round(n).toLocaleString("en"), under: "segments" }) +
    `${keyHtml(steps)}</div>` +
    (hasBytes
      ? `<div><h2>Longer texts: memory between cells</h2><p class="quiet">The most that is alive on one level: ${bytes(M.carriedAt[longest] + M.valuesAt[longest])} at most for ${count(M.segments[longest], "segment")}.</p>` +
        plotHtml({ id: "plot-bytes", label: "Bytes alive by number of segments", xs: M.segments, series: peaks, shown: bytes, under: "segments" }) +
        `${keyHtml(peaks)}</div>`
      : "") +
    `</div>`;
  const cursor = (id, share) => {
    const plot = $(id);
    if (!plot) return;
    const [x0, x1] = [Number(plot.dataset.x0), Number(plot.dataset.x1)];
    plot.querySelector(".cursor").setAttribute("d", `M${x0 + share * (x1 - x0)} ${PLOT.top}V${PLOT.high - PLOT.bottom}`);
  };
  const [first, last] = [M.segments[0], Math.max(M.segments[longest], M.segments[0] + 1)];
  ["plot-levels", "plot-bytes"].forEach((id) => cursor(id, (G.segments - first) / (last - first)));
  const draw = () => {
    if (panel.hidden || !hasBytes) return;
    cursor("plot-alive", state.level / Math.max(1, G.levels - 1));
    const [carried, values] = [M.carried[state.level], M.values[state.level]];
    $("alive-now").textContent = `level ${state.level}: ${bytes(carried)} carried, ${bytes(values)} within segments`;
  };
  if (hasBytes)
    $("plot-alive").addEventListener("click", (e) => {
      const plot = $("plot-alive"),
        area = plot.getBoundingClientRect(),
        at = ((e.clientX - area.left) / area.width) * PLOT.wide;
      const [x0, x1] = [Number(plot.dataset.x0), Number(plot.dataset.x1)];
      setLevel(((at - x0) / (x1 - x0)) * (G.levels - 1));
    });
  watch((what) => {
    if (what === "level") draw();
  });
  return draw;
}
