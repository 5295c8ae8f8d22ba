// The panel of one cell: what it depends on, what enters and leaves it, and its operations.

const templateOf = ([s, l]) => V.cells.find((c) => c.variant === G.variants[s] && c.kind === G.kinds[l]);
let shownTemplate = null;

/** Variant and kind of a cell, where there are several. */
const sortOf = ([s, l]) =>
  [
    ["variant", G.variants[s], new Set(G.variants).size],
    [`kind ${kindLetter(l)}`, G.kinds[l], kinds.length],
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
  const keep = shownTemplate === found && found && $("opfilter") ? $("opfilter").value : "";
  shownTemplate = found;
  $("cell").innerHTML =
    `<p class="meta">level <b>${t}</b>, <span class="phase ${phaseOf(t)}">${PHASE_WORDS[phaseOf(t)]}</span>, ` +
    `${others ? `together with <b>${count(others, "other cell")}</b>` : "alone on its level"}${sort ? `; ${sort}` : ""}</p>` +
    linksHtml(cell, -1, "Waits for", "in", "nothing: it can start at once") +
    linksHtml(cell, 1, "Feeds", "out", "nothing in the grid") +
    carriesHtml(cell) +
    (found
      ? templateHtml(found)
      : `<h3>Operations</h3><p class="quiet">None were recorded in this file.</p>`);
  if (found) {
    $("opfilter").value = keep;
    $("opfilter").addEventListener("input", () => filterOps(found));
    renderOps(found);
    if (keep) filterOps(found);
  }
}

function linksHtml(cell, sign, title, cls, none) {
  const list = linked(cell, sign).map(([other, offset]) => {
    const carried = handedOn(sign < 0 ? other : cell, offset).join(", ");
    const where = sign < 0 ? whereFrom(offset) : whereTo(offset);
    return `<button class="chip ${cls}" data-cell="${other}"><b>${pair(other)}</b><small>${esc(carried || where)}</small></button>`;
  });
  return `<h3>${title}</h3><div class="chips">${list.join("") || `<span class="quiet">${none}</span>`}</div>`;
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
    .join("");
  return rows ? `<h3>Carried between segments</h3><table><tbody>${rows}</tbody></table>` : "";
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

function templateHtml(found) {
  return (
    valuesHtml("Reads (live-ins)", found.liveIns) +
    valuesHtml("Leaves for others (live-outs)", found.liveOuts) +
    (found.params.length
      ? `<details><summary>${count(found.params.length, "parameter")} of this layer</summary>${valuesHtml("", found.params)}</details>`
      : "") +
    (found.functions.length && V.code
      ? `<p class="quiet infn">Computed by ${found.functions.map((f) => `<button class="link mono" data-function="${esc(f)}">${esc(f)}</button>`).join(", ")} in the generated code.</p>`
      : "") +
    `<div class="opshead"><h3 id="opcount"></h3><input type="search" id="opfilter" placeholder="filter" aria-label="Filter operations by name, operation, module or source"></div>` +
    `<table class="ops"><thead><tr><th>operation</th><th>result</th><th style="text-align:right">source</th></tr></thead><tbody id="ops"></tbody></table>`
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

function renderOps(found) {
  $("ops").innerHTML = opRows(found.ops).join("");
  $("opcount").textContent = count(found.ops.length, "operation");
  $("ops").addEventListener("pointerover", (e) => traceOp(found, e.target.closest("[data-op]")));
  $("ops").addEventListener("pointerleave", () => traceOp(found, null));
}

/** Shade the operations that the one under the pointer reads, and those that read it. */
function traceOp(found, row) {
  $("ops")
    .querySelectorAll(".uses, .used")
    .forEach((r) => r.classList.remove("uses", "used"));
  if (!row) return;
  const [name, , , , , inputs] = found.ops[row.dataset.op];
  $("ops")
    .querySelectorAll("[data-op]")
    .forEach((r) => {
      const other = found.ops[r.dataset.op];
      r.classList.toggle("uses", inputs.includes(other[0]));
      r.classList.toggle("used", other[5].includes(name));
    });
}

function filterOps(found) {
  const text = $("opfilter").value.toLowerCase();
  let shown = 0;
  $("ops")
    .querySelectorAll("tr")
    .forEach((row) => {
      const op = row.dataset.op === undefined ? null : found.ops[row.dataset.op];
      const fits = !text || (op !== null && op.slice(0, 5).join(" ").toLowerCase().includes(text));
      row.hidden = !fits;
      shown += fits && op ? 1 : 0;
    });
  $("opcount").textContent = text
    ? `${shown} of ${count(found.ops.length, "operation")}`
    : count(found.ops.length, "operation");
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
  });
  renderCell();
}
