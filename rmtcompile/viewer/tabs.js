// The code and the explanation, and the tabs that hold all parts.

const KEYWORDS = new Set(
  (
    "False None True and as assert async await break class continue def del elif else except finally for from global if " +
    "import in is lambda nonlocal not or pass raise return try while with yield"
  ).split(" "),
);
const TOKEN =
  /("""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|[rbf]?"(?:[^"\\\n]|\\.)*"|[rbf]?'(?:[^'\\\n]|\\.)*')|(#[^\n]*)|\b([A-Za-z_]\w*)\b|\b(\d[\w.]*)/g;

/** Python, coloured, as one HTML string a line; strings over several lines are closed and opened at line ends. */
function coloured(code) {
  let out = "",
    at = 0;
  const span = (cls, text) =>
    text
      .split("\n")
      .map((part) => `<span class="${cls}">${esc(part)}</span>`)
      .join("\n");
  for (const m of code.matchAll(TOKEN)) {
    out += esc(code.slice(at, m.index));
    const [text, str, comment, word, number] = m;
    if (str) out += span("st", text);
    else if (comment) out += span("cm", text);
    else if (number) out += span("nu", text);
    else out += word && KEYWORDS.has(word) ? span("kw", text) : esc(text);
    at = m.index + text.length;
  }
  return (out + esc(code.slice(at))).split("\n");
}

const functions = [...V.code.matchAll(/^def (\w+)\(/gm)].map((m) => [
  m[1],
  V.code.slice(0, m.index).split("\n").length,
]);

function scrollToLine(n) {
  const view = document.querySelector("#panel-code .code");
  view.scrollTop = view.querySelector(`[data-line="${n}"]`).offsetTop - view.offsetTop - 40;
}

/** Open the code at a function. */
function showFunction(name) {
  const found = functions.find(([f]) => f === name);
  if (!found) return;
  $("tab-code").click();
  $("functions").value = found[1];
  scrollToLine(found[1]);
  document.querySelector(".tabs").scrollIntoView();
  document.querySelector("#panel-code .code").focus({ preventScroll: true });
}

function initCode(panel) {
  const phaseAt = (n) =>
    Object.keys(V.codePhases).find((p) => n >= V.codePhases[p][0] && n <= V.codePhases[p][1]) || "";
  const lines = coloured(V.code.replace(/\n$/, "")).map(
    (html, i) => `<span class="line ${phaseAt(i + 1)}" data-line="${i + 1}"><i>${i + 1}</i>${html}</span>`,
  );
  const jumps = Object.keys(V.codePhases).map(
    (p) =>
      `<button data-jump="${V.codePhases[p][0]}" class="phase ${p}">${PHASE_WORDS[p]}, line ${V.codePhases[p][0]}</button>`,
  );
  panel.innerHTML =
    `<h2>The code that runs</h2><div class="codehead" style="margin-top:6px">${jumps.join("") || ""}` +
    `<label class="quiet">function <select id="functions">${functions.map(([name, n]) => `<option value="${n}">${esc(name)}, line ${n}</option>`).join("")}</select></label></div>` +
    `<div class="code" tabindex="0" role="region" aria-label="Generated Python">${lines.join("")}</div>`;
  panel.addEventListener("click", (e) => {
    const jump = e.target.closest("[data-jump]");
    if (jump) scrollToLine(jump.dataset.jump);
  });
  $("functions").addEventListener("change", (e) => scrollToLine(e.target.value));
  const mark = () =>
    panel
      .querySelectorAll(".line")
      .forEach((line) => line.classList.toggle("current", line.classList.contains(phaseOf(state.level))));
  watch((what) => {
    if (what === "level" && !panel.hidden) mark();
  });
  return mark;
}

function initExplanation(panel) {
  const rows = V.explanation.map(
    ([title, lines]) => `<tr><th>${esc(title)}</th><td class="mono">${lines.map(esc).join("<br>")}</td></tr>`,
  );
  panel.innerHTML = `<h2>What was found, and why it runs as it does</h2><table class="why"><tbody>${rows.join("")}</tbody></table>`;
}

function initTabs() {
  const tabs = [
    ["deps", "Dependences and carries", initGraph],
    ["time", "Time", initTime],
    ["memory", "Memory and length", initMemory],
  ];
  if (V.passes.length) tabs.push(["passes", "Passes", initPasses]);
  if (V.code) tabs.push(["code", "Code", initCode]);
  if (V.explanation.length) tabs.push(["why", "Explanation", initExplanation]);
  const shown = {};
  $("tablist").innerHTML = tabs
    .map(
      ([id, name]) =>
        `<button role="tab" id="tab-${id}" aria-controls="panel-${id}" aria-selected="false" tabindex="-1">${name}</button>`,
    )
    .join("");
  const show = () =>
    tabs.forEach(([other]) => {
      const on = other === state.tab;
      $(`tab-${other}`).setAttribute("aria-selected", on);
      $(`tab-${other}`).tabIndex = on ? 0 : -1;
      $(`panel-${other}`).hidden = !on;
      if (on && shown[other]) shown[other]();
    });
  tabs.forEach(([id, , init]) => {
    const panel = document.createElement("div");
    Object.assign(panel, { id: `panel-${id}`, hidden: true });
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${id}`);
    $("panels").append(panel);
    shown[id] = init(panel);
    $(`tab-${id}`).addEventListener("click", () => setTab(id));
  });
  $("tablist").addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step) return;
    const at = tabs.findIndex(([id]) => id === state.tab);
    setTab(tabs[(at + step + tabs.length) % tabs.length][0]);
    $(`tab-${state.tab}`).focus();
    e.preventDefault();
    e.stopPropagation();
  });
  watch((what) => {
    if (what === "tab") show();
  });
  setTab(tabs[0][0]);
}
