// Deep links: what the page shows, in the fragment of its address. `#tab=passes&level=5&cell=2,3`

/** What a fragment says, as far as this page has it. */
function readLink(fragment) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  const number = (name, n) => {
    const text = given.get(name) || "";
    return /^\d+$/.test(text) && Number(text) < n ? Number(text) : null;
  };
  const cell = /^(\d+),(\d+)$/.exec(given.get("cell") || "");
  const at = cell && [Number(cell[1]), Number(cell[2])];
  return {
    tab: given.get("tab"),
    level: number("level", G.levels),
    cell: at && inGrid(at) ? at : null,
    pass: number("pass", V.passes.length),
    from: number("from", V.passes.length),
    filter: given.get("filter"),
  };
}

function linkOf() {
  const parts = [
    ["tab", state.tab],
    ["level", state.level],
    ["cell", state.cell.join(",")],
    ["pass", state.pass],
    ["from", state.from],
    ["filter", state.filter || null],
  ];
  const said = parts.filter(([, value]) => value !== null);
  return `#${said.map(([name, value]) => `${name}=${encodeURIComponent(value).replace(/%2C/g, ",")}`).join("&")}`;
}

/** Go where a fragment says; what it does not name stays. */
function follow(fragment) {
  const { tab, level, cell, pass, from, filter } = readLink(fragment);
  if (filter !== null) setFilter(filter);
  if (pass !== null || from !== null) setPasses(pass, from);
  if (cell) setCell(cell);
  if (level !== null) {
    if (!cell) setCell(cellsOf(level)[Math.floor(widths[level] / 2)]);
    setLevel(level);
  }
  if (tab) setTab(tab);
}

let written = 0;
function initLinks() {
  if (location.hash) follow(location.hash);
  watch((what) => {
    if (what === "hover" || what === "theme") return;
    // Browsers refuse more than some writes a second.
    clearTimeout(written);
    written = setTimeout(() => {
      try {
        history.replaceState(null, "", linkOf());
      } catch {
        // A page inside of another one may have no address of its own.
      }
    }, 200);
  });
  window.addEventListener("hashchange", () => follow(location.hash));
}
