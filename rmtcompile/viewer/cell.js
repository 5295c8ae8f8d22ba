// The panel of one cell: what it depends on, what enters and leaves it, and its operations.

const templateOf = ([s, l]) => V.cells.find((c) => c.variant === G.variants[s] && c.kind === G.kinds[l]);

/** Variant and kind of a cell, where there are several. */
const sortOf = ([s, l]) =>
  [
    ["variant", G.variants[s], new Set(G.variants).size],
    [`kind ${kindLetter(l)}`, G.kinds[l], kinds.length],
    ["band", bandOf(l), G.bands.length],
  ]
    .filter(([, , many]) => many > 1)
    .map(([word, name]) => `${word} <b class="flat">${esc(name)}</b>`)
    .join(", ");

function renderCell() {
  const cell = state.cell,
    [s, l] = cell,
    t = levelOf(cell),
    found = templateOf(cell);
  $("cell-h").textContent = `Cell (${s},${l}): segment ${s}, layer ${l}`;
  const others = widths[t] - 1,
    sort = sortOf(cell);
  $("cell").innerHTML =
    `<p class="meta">level <b>${t}</b>, <span class="phase ${phaseOf(t)}">${PHASE_WORDS[phaseOf(t)]}</span>, ` +
    `${others ? `together with <b>${count(others, "other cell")}</b>` : "alone on its level"}${sort ? `; ${sort}` : ""}</p>` +
    linksHtml(cell, -1, "Waits for", "in", "nothing: it can start at once") +
    linksHtml(cell, 1, "Feeds", "out", "nothing in the grid") +
    (found
      ? templateHtml(found, cell)
      : carriesHtml(cell) + `<h3>Operations</h3><p class="quiet">None were recorded in this file.</p>`);
  if (!found) return;
  $("opfilter").value = state.filter;
  $("opfilter").addEventListener("input", () => setFilter($("opfilter").value));
  tablesOf(found).forEach(([id, ops]) => traceOps($(id), ops));
  filterOps(found);
}

function linksHtml(cell, sign, title, cls, none) {
  const list = linked(cell, sign).map(([other, offset]) => {
    const carried = handedOn(sign < 0 ? other : cell, offset).join(", ");
    const where = sign < 0 ? whereFrom(offset) : whereTo(offset);
    return `<button class="chip ${cls}" data-cell="${other}"><b>${pair(other)}</b><small>${esc(carried || where)}</small></button>`;
  });
  return `<div class="links"><h3>${title}</h3><div class="chips">${list.join("") || `<span class="quiet">${none}</span>`}</div></div>`;
}

function carriesHtml([s, l]) {
  const rows = G.carries
    .map((c) => {
      const reads = c.layers.includes(l - c.offset[1]) && s >= c.offset[0];
      const writes = c.layers.includes(l) && s + c.offset[0] < G.segments;
      const what = [reads && "reads", writes && "writes"].filter(Boolean).join(", ");
      return what
        ? `<tr><td class="mono">${esc(c.name)}</td><td class="mono">${esc(c.type)}</td><td>${what}</td><td class="num">${bytes(c.bytes)}</td></tr>`
        : "";
    })
    .filter(Boolean);
  return rows.length
    ? folded("Carried between segments", rows.length, "value", `<table><tbody>${rows.join("")}</tbody></table>`)
    : "";
}

const valuesHtml = (title, values) =>
  values.length
    ? `${title && `<h3>${title}</h3>`}<table><tbody>${values
        .map(
          (v) =>
            `<tr><td class="mono">${esc(v.name)}</td><td class="mono">${esc(v.type)}</td><td class="quiet">${esc(v.note)}</td></tr>`,
        )
        .join("")}</tbody></table>`
    : "";

/** The operations of a cell and those of the functions that compute it, each table with its id. */
const tablesOf = (found) => [
  ["ops", found.ops],
  ...found.functions.filter((f) => V.generated[f]).map((f) => [`ops-${f}`, V.generated[f]]),
];

const opsTable = (id, ops) =>
  `<table class="ops"><thead><tr><th>operation</th><th>result</th><th class="src">source</th></tr></thead><tbody id="${esc(id)}">${opRows(ops).join("")}</tbody></table>`;

const folded = (title, n, noun, html) =>
  n ? `<details><summary>${title}: ${count(n, noun)}</summary>${html}</details>` : "";

function templateHtml(found, cell) {
  const generated = tablesOf(found)
    .slice(1)
    .map(([id, ops], i) => {
      const name = found.functions.filter((f) => V.generated[f])[i];
      return (
        `<details class="generated"><summary><span class="mono">${esc(name)}</span>, <span id="count-${esc(id)}"></span></summary>` +
        `${opsTable(id, ops)}</details>`
      );
    });
  return (
    carriesHtml(cell) +
    folded("Reads (live-ins)", found.liveIns.length, "value", valuesHtml("", found.liveIns)) +
    folded("Leaves for others (live-outs)", found.liveOuts.length, "value", valuesHtml("", found.liveOuts)) +
    folded("Weights of this layer", found.params.length, "parameter", valuesHtml("", found.params)) +
    `<div class="opshead"><h3 id="count-ops"></h3><input type="search" id="opfilter" placeholder="filter" aria-label="Filter operations by name, operation, module or source"></div>` +
    opsTable("ops", found.ops) +
    (found.functions.length && V.code
      ? `<h3>Generated code</h3><p class="quiet">Computed for n cells at once by ${found.functions.map((f) => `<button class="link mono" data-function="${esc(f)}">${esc(f)}</button>`).join(", ")}.</p>`
      : "") +
    generated.join("")
  );
}

/** Operations as table rows, under the modules that ran them. */
function opRows(ops) {
  let module = null;
  return ops.map(([name, op, type, source, path], i) => {
    const head = path && path !== module ? `<tr class="module"><td colspan="3">${esc(path)}</td></tr>` : "";
    module = path || module;
    const shown = name === op ? esc(op) : `${esc(op)} <span class="quiet">${esc(name)}</span>`;
    return `${head}<tr data-op="${i}"><td>${shown}</td><td>${esc(type)}</td><td class="src" title="${esc(source)}">${esc(source.split("/").pop())}</td></tr>`;
  });
}

/** Shade the operations that the one under the pointer reads, and those that read it. */
function traceOps(table, ops) {
  const trace = (row) => {
    const read = row ? ops[row.dataset.op] : null;
    table.querySelectorAll("[data-op]").forEach((r) => {
      const other = ops[r.dataset.op];
      r.classList.toggle("uses", read !== null && read[5].includes(other[0]));
      r.classList.toggle("used", read !== null && other[5].includes(read[0]));
    });
  };
  table.addEventListener("pointerover", (e) => trace(e.target.closest("[data-op]")));
  table.addEventListener("pointerleave", () => trace(null));
}

/** Whether an operation has a text in its name, operation, target, type, module or source. */
const fitsFilter = (op, text) => [...op.slice(0, 5), op[6]].join(" ").toLowerCase().includes(text);

/** Show what fits the filter, in the operations of the cell and in the generated ones. */
function filterOps(found) {
  const text = state.filter.trim().toLowerCase();
  tablesOf(found).forEach(([id, ops]) => {
    let [shown, heading, under] = [0, null, 0];
    $(id)
      .querySelectorAll("tr")
      .forEach((row) => {
        if (row.dataset.op === undefined) {
          [heading, under] = [row, 0];
          heading.hidden = text !== "";
          return;
        }
        const fits = !text || fitsFilter(ops[row.dataset.op], text);
        row.hidden = !fits;
        shown += fits ? 1 : 0;
        under += fits ? 1 : 0;
        if (heading && under) heading.hidden = false;
      });
    const all = count(ops.length, "operation");
    $(`count-${id}`).textContent = text ? `${shown} of ${all}` : all;
    const box = $(id).closest("details");
    if (box) box.open = text !== "" && shown > 0;
  });
}

function initCell() {
  $("cell").addEventListener("click", (e) => {
    const chip = e.target.closest("[data-cell]");
    if (chip) {
      setCell(chip.dataset.cell.split(",").map(Number));
      $("grid").focus({ preventScroll: true });
    }
    const name = e.target.closest("[data-function]");
    if (name) showFunction(name.dataset.function);
  });
  watch((what) => {
    if (what === "cell") renderCell();
    const found = templateOf(state.cell);
    if (what === "filter" && found) {
      if ($("opfilter").value !== state.filter) $("opfilter").value = state.filter;
      filterOps(found);
    }
  });
  renderCell();
}
