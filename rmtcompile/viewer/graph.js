// Dependences: each offset in words with what it carries, and the graph of cells, time running to the right.

const WHOLE_GRAPH = 150;

function flowHtml() {
  const items = G.offsets.map((offset, i) => {
    const carried = carriesOf(offset),
      [ds, dl] = offset,
      read = G.readers[i];
    const possible = G.layers - Math.abs(dl);
    const words =
      read.length === 1
        ? `Layer ${read[0]} waits for layer ${read[0] - dl} of the ${ds === 0 ? "same segment" : ds === 1 ? "previous segment" : `segment ${ds} earlier`}.`
        : `Cell (s, l) waits for cell (${term("s", -ds)}, ${term("l", -dl)}): ${whereFrom(offset)}${read.length < possible ? `; only in layers ${spans(read)}` : ""}.`;
    const what = carried.length
      ? carriedTable(carried)
      : `<p>${ds ? "A value of an earlier segment." : "The activations that go up the stack of layers."}</p>`;
    const seen = V.witnesses.find(([o]) => same(o, offset));
    const proof = seen
      ? `<details><summary>where the model does it</summary><p class="mono">${esc(seen[1])}<br>reads ${esc(seen[2])}</p></details>`
      : "";
    return `<article class="${ds ? "carry" : ""}"><b>offset ${pair(offset)}</b><p>${words}</p>${what}${proof}</article>`;
  });
  return `<div class="flow">${items.join("") || `<p class="quiet">No cell depends on another.</p>`}</div>`;
}
const term = (name, by) => (by === 0 ? name : `${name} ${by < 0 ? "−" : "+"} ${Math.abs(by)}`);

function carriedTable(carried) {
  const rows = carried.map(
    (c) =>
      `<tr><td class="mono">${esc(c.name)}</td><td class="mono">${esc(c.type)}</td>` +
      `<td>${layerWords(c.layers)}${c.through ? `, through ${esc(c.through)}` : ""}${c.source ? `<br><span class="mono quiet" title="${esc(c.source)}">${esc(c.source.split("/").pop())}</span>` : ""}</td>` +
      `<td class="num">${bytes(c.bytes)}</td><td class="num">${bytes(c.total)}</td></tr>`,
  );
  return `<table><thead><tr><th>carried</th><th>type</th><th>written by</th><th class="num">a cell</th><th class="num">in all</th></tr></thead><tbody>${rows.join("")}</tbody></table>`;
}

/** The cells to draw: all of a small grid, otherwise those around the selected one. */
function graphCells() {
  const all = [];
  const [s0, l0] = state.cell,
    whole = G.layers * G.segments <= WHOLE_GRAPH;
  for (let s = 0; s < G.segments; s += 1) {
    for (let l = 0; l < G.layers; l += 1) {
      const near =
        Math.abs(levelOf([s, l]) - levelOf([s0, l0])) <= 5 &&
        Math.abs(l - l0) <= 3 &&
        (G.alpha || Math.abs(s - s0) <= 2);
      if (whole || near) all.push([s, l]);
    }
  }
  return { all, whole };
}

/** What runs outside the grid, with its operations. */
function aroundHtml() {
  if (!V.around.length) return "";
  const parts = V.around.map(
    (r) =>
      `<details><summary>${esc(r.kind)}: ${esc(r.variant)}, ${count(r.ops.length, "operation")}</summary>` +
      valuesHtml("Reads", r.liveIns) +
      `<h3>Operations</h3><table class="ops"><tbody>${opRows(r.ops).join("")}</tbody></table></details>`,
  );
  return `<h2 class="below">Around the grid</h2><p class="quiet">Embedding, head and the like: no layer's work.</p>${parts.join("")}`;
}

function renderGraph() {
  const { all, whole } = graphCells();
  const levels = all.map(levelOf),
    layers = all.map((c) => c[1]);
  const [t0, t1, l0, l1] = [
    Math.min(...levels),
    Math.max(...levels),
    Math.min(...layers),
    Math.max(...layers),
  ];
  const lane = G.alpha === 0 ? new Set(all.map((c) => c[0])).size : 1;
  const firstS = Math.min(...all.map((c) => c[0]));
  const [dx, dy, w, h] = [70, 40, 50, 24];
  const x = (c) => 50 + (levelOf(c) - t0) * dx + (G.alpha === 0 ? (6 * (c[0] - firstS)) / lane : 0);
  const y = (c) => 14 + (G.alpha === 0 ? c[0] - firstS : l1 - c[1]) * dy;
  const rows = G.alpha === 0 ? lane : l1 - l0 + 1;
  const [width, height] = [50 + (t1 - t0) * dx + 36, 14 + rows * dy + 16];
  const drawn = new Set(all.map(String)),
    parts = [];
  if (state.level >= t0 && state.level <= t1) {
    parts.push(
      `<rect class="band" x="${50 + (state.level - t0) * dx - 32}" y="0" width="64" height="${height - 18}" rx="8"/>`,
    );
  }
  all.forEach((c) =>
    linked(c, 1).forEach(([other, offset]) => {
      if (!drawn.has(String(other))) return;
      const cls = same(other, state.cell) ? " in" : same(c, state.cell) ? " out" : "";
      const [x1, y1, x2, y2] = [x(c) + w / 2, y(c) + h / 2, x(other) - w / 2, y(other) + h / 2];
      const bend = Math.max(14, (x2 - x1) / 2);
      parts.push(
        `<path class="edge${offset[0] ? " seg" : ""}${cls}" marker-end="url(#head${cls.trim()})" d="M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2 - 3} ${y2}"/>`,
      );
    }),
  );
  all.forEach((c) => {
    const t = levelOf(c),
      sel = same(c, state.cell) ? " sel" : "";
    parts.push(
      `<rect class="node${sel}" data-cell="${c}" x="${x(c) - w / 2}" y="${y(c)}" width="${w}" height="${h}" rx="5" ` +
        `fill="var(${PHASE_COLOURS[phaseOf(t)]}${t === state.level ? "" : "-bg"})"><title>segment ${c[0]}, layer ${c[1]}, level ${t}</title></rect>` +
        `<text x="${x(c)}" y="${y(c) + 16}"${t === state.level ? ' style="fill:#10161a"' : ""}>${pair(c)}</text>`,
    );
  });
  for (let t = t0; t <= t1; t += 1)
    parts.push(
      `<text class="axis" x="${50 + (t - t0) * dx}" y="${height - 3}">${t === t0 ? "level " : ""}${t}</text>`,
    );
  const head = (id, colour) =>
    `<marker id="${id}" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="var(${colour})"/></marker>`;
  $("dag").innerHTML =
    `<svg width="${width}" height="${height}" role="img" aria-label="Dependence graph of cells"><defs>` +
    `${head("head", "--soft")}${head("headin", "--in")}${head("headout", "--out")}</defs>${parts.join("")}</svg>`;
  $("dagnote").textContent =
    `${whole ? "All cells" : "Cells near the selected one"}, named (segment, layer). Time runs to the right: ` +
    "a column is a level, and its cells run together. Thick lines go to a later segment.";
}

function initGraph(panel) {
  panel.innerHTML =
    `<div class="split"><div><h2>What each cell waits for</h2><p class="quiet" style="margin:2px 0 10px">Where the other cell lies outside the grid there is nothing to wait for.</p>${flowHtml()}</div>` +
    `<div><h2>Graph of cells</h2><p class="quiet" id="dagnote" style="margin:2px 0 10px"></p><div class="dag" id="dag" tabindex="0" role="region" aria-label="Dependence graph, scrolls sideways"></div>${aroundHtml()}</div></div>`;
  $("dag").addEventListener("click", (e) => {
    const node = e.target.closest("[data-cell]");
    if (node) setCell(node.dataset.cell.split(",").map(Number));
  });
  const draw = () => {
    if (!panel.hidden) renderGraph();
  };
  watch((what) => {
    if (what === "level" || what === "cell") draw();
  });
  return draw;
}
