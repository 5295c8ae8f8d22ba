// Pipeline, code and time, and the tabs that hold them.

function initPipeline(panel) {
  const total = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
  const most = Math.max(1, ...V.passes.map((p) => Math.max(total(p.before), total(p.after))));
  const rows = V.passes.map((p, i) => {
    const [was, is] = [total(p.before), total(p.after)];
    const names = [...new Set([...Object.keys(p.before), ...Object.keys(p.after)])];
    const moved = names
      .map((n) => [n, p.before[n] || 0, p.after[n] || 0])
      .filter(([, a, b]) => a !== b)
      .sort((a, b) => Math.abs(b[2] - b[1]) - Math.abs(a[2] - a[1]));
    const chips = moved
      .slice(0, 10)
      .map(
        ([n, a, b]) =>
          `<span class="chip"><span class="mono">${esc(n)}</span>${was ? `<span class="${b < a ? "less" : "more"}">${a} → ${b}</span>` : b}</span>`,
      );
    if (moved.length > 10) chips.push(`<span class="quiet">and ${moved.length - 10} more</span>`);
    const first = was === 0;
    return (
      `<tr><td class="num quiet">${i}</td><td><b>${esc(p.name)}</b></td>` +
      `<td class="num">${first ? "" : `${was.toLocaleString("en")} → `}<b>${is.toLocaleString("en")}</b></td>` +
      `<td style="width:160px"><i class="bar was" style="width:${(100 * was) / most}%"></i><i class="bar" style="width:${(100 * is) / most}%"></i></td>` +
      `<td><div class="chips">${chips.join("") || `<span class="quiet">same operations</span>`}</div>${p.note ? `<p class="quiet">${esc(p.note)}</p>` : ""}</td>` +
      `<td class="num">${p.seconds ? micros(p.seconds * 1e6) : ""}</td></tr>`
    );
  });
  panel.innerHTML =
    `<h2>How the program was compiled</h2><p class="quiet" style="margin:2px 0 8px">Each pass, with the number of operations in the program before it and after it.</p>` +
    `<table class="pipe"><thead><tr><th></th><th>pass</th><th class="num">operations</th><th></th><th>what changed</th><th class="num">took</th></tr></thead><tbody>${rows.join("")}</tbody></table>`;
}

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

const sum = (values) => values.reduce((a, b) => a + b, 0);
const phaseTimes = () =>
  Object.keys(G.phases)
    .filter((n) => G.phases[n][1] > G.phases[n][0])
    .map((n) => [n, sum(V.profile.levelUs.slice(...G.phases[n]))]);
const totalTime = () => sum(V.profile.levelUs) + V.profile.outsideUs;
const kindTimes = () => Object.entries(V.profile.kindUs).sort((a, b) => b[1] - a[1]);
const hbar = (name, part, whole, most, cls = "") =>
  `<div class="hbar"><span>${esc(name)}</span><span><i class="${cls}" style="width:${(100 * part) / most}%"></i></span><span>${micros(part)} <span class="quiet">${percent(part, whole)}</span></span></div>`;

function initTime(panel) {
  const p = V.profile;
  if (!p) {
    panel.innerHTML = `<h2>No measured times</h2><p class="quiet">This file holds the plan only. A profile (<code>fast.profile(...)</code>) adds the time of each level and of each kind of operation.</p>`;
    return null;
  }
  const total = totalTime();
  const phases = phaseTimes(),
    spent = kindTimes();
  const kindTotal = sum(spent.map((k) => k[1])),
    longest = Math.max(p.outsideUs, ...phases.map((x) => x[1]));
  const slowest = p.levelUs.indexOf(Math.max(...p.levelUs));
  const faster = p.sequentialUs
    ? `, against ${micros(p.sequentialUs)}: <b>${speed(total, p.sequentialUs)}</b>`
    : "";
  const used = p.utilisation.length
    ? ` The device was used to ${percent(sum(p.utilisation.map((u, t) => u * p.levelUs[t])), total)} of its peak.`
    : "";
  panel.innerHTML =
    `<h2>Where the time goes</h2><p class="quiet" style="margin:2px 0 12px"><b style="color:var(--ink)">${micros(total)}</b> in all${faster}${V.device ? `, on ${esc(V.device)}` : ""}. ` +
    `${micros(total / (G.layers * G.segments))} a cell; the slowest level is ${slowest} (${micros(p.levelUs[slowest])}).${used} A level includes what happens to the segment that enters and to the one that leaves.</p>` +
    `<div class="times"><div><h3 style="margin-top:0">Time of each level</h3><canvas id="timechart" role="img" aria-label="Measured time of each level"></canvas></div><div>` +
    `<h3 style="margin-top:0">By phase</h3>${phases.map(([n, t]) => hbar(`${PHASE_WORDS[n]}, ${count(G.phases[n][1] - G.phases[n][0], "level")}`, t, total, longest, n)).join("")}` +
    (p.outsideUs ? hbar("outside of levels", p.outsideUs, total, longest, "outside") : "") +
    (spent.length
      ? `<h3>By kind of operation</h3>${spent.map(([k, t]) => hbar(k, t, kindTotal, spent[0][1])).join("")}`
      : "") +
    `</div></div><details><summary>All levels as a table</summary>${levelTable()}</details>`;
  const draw = () => {
    if (!panel.hidden) drawTimes();
  };
  dragLevels($("timechart"), 52, 8);
  watch((what) => {
    if (what === "level" || what === "theme") draw();
  });
  window.addEventListener("resize", draw);
  return draw;
}

function levelTable() {
  const p = V.profile,
    used = p.utilisation.length > 0;
  const rows = p.levelUs.map(
    (us, t) =>
      `<tr><td class="num">${t}</td><td>${PHASE_WORDS[phaseOf(t)]}</td><td class="num">${widths[t]}</td><td class="num">${callsOf(t)}</td>` +
      `<td class="num">${micros(us)}</td><td class="num">${micros(us / widths[t])}</td>${used ? `<td class="num">${percent(p.utilisation[t], 1)}</td>` : ""}</tr>`,
  );
  return (
    `<table class="levels"><thead><tr><th class="num">level</th><th>phase</th><th class="num">cells</th><th class="num">calls</th><th class="num">time</th><th class="num">a cell</th>` +
    `${used ? `<th class="num">of peak</th>` : ""}</tr></thead><tbody>${rows.join("")}</tbody></table>`
  );
}

function drawTimes() {
  const p = V.profile,
    canvas = $("timechart"),
    wide = canvas.parentElement.clientWidth,
    tall = 190;
  const ctx = sized(canvas, wide, tall + 22),
    most = Math.max(...p.levelUs);
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  [0, 0.5, 1].forEach((f) => {
    const y = tall - f * (tall - 10);
    ctx.fillStyle = palette.soft;
    ctx.fillText(f ? micros(f * most) : "0", 46, y - (f === 0 ? 2 : 0));
    ctx.fillStyle = palette.line;
    ctx.fillRect(52, y, wide - 60, 1);
  });
  const step = (wide - 60) / G.levels;
  p.levelUs.forEach((us, t) => {
    const h = (us / most) * (tall - 10),
      now = t === state.level;
    ctx.fillStyle = now ? palette.ink : phaseColour(phaseOf(t));
    ctx.globalAlpha = now ? 1 : 0.75;
    ctx.fillRect(52 + t * step, tall - h, Math.max(1, step - (step > 4 ? 1.5 : 0)), h);
  });
  ctx.globalAlpha = 1;
  if (p.utilisation.length) {
    ctx.strokeStyle = palette.out;
    ctx.lineWidth = 1.6;
    ctx.beginPath();
    p.utilisation.forEach((u, t) =>
      ctx[t ? "lineTo" : "moveTo"](52 + (t + 0.5) * step, tall - u * (tall - 10)),
    );
    ctx.stroke();
  }
  ctx.fillStyle = palette.soft;
  ctx.textAlign = "left";
  const util = p.utilisation.length
    ? `, device used ${percent(p.utilisation[state.level], 1)} (line: share of peak)`
    : "";
  ctx.fillText(
    `level ${state.level}: ${micros(p.levelUs[state.level])}, ${count(widths[state.level], "cell")}, ${micros(p.levelUs[state.level] / widths[state.level])} a cell${util}`,
    52,
    tall + 13,
  );
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
  ];
  if (V.passes.length) tabs.push(["pipeline", "Pipeline", initPipeline]);
  if (V.code) tabs.push(["code", "Code", initCode]);
  if (V.explanation.length) tabs.push(["why", "Explanation", initExplanation]);
  const shown = {};
  $("tablist").innerHTML = tabs
    .map(
      ([id, name]) =>
        `<button role="tab" id="tab-${id}" aria-controls="panel-${id}" aria-selected="false" tabindex="-1">${name}</button>`,
    )
    .join("");
  const select = (id, focus) =>
    tabs.forEach(([other]) => {
      const on = other === id;
      $(`tab-${other}`).setAttribute("aria-selected", on);
      $(`tab-${other}`).tabIndex = on ? 0 : -1;
      $(`panel-${other}`).hidden = !on;
      if (on && focus) $(`tab-${other}`).focus();
      if (on && shown[other]) shown[other]();
    });
  tabs.forEach(([id, , init]) => {
    const panel = document.createElement("div");
    Object.assign(panel, { id: `panel-${id}`, hidden: true });
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${id}`);
    $("panels").append(panel);
    shown[id] = init(panel);
    $(`tab-${id}`).addEventListener("click", () => select(id));
  });
  $("tablist").addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step) return;
    const at = tabs.findIndex(([id]) => $(`tab-${id}`).getAttribute("aria-selected") === "true");
    select(tabs[(at + step + tabs.length) % tabs.length][0], true);
    e.preventDefault();
    e.stopPropagation();
  });
  select(tabs[0][0]);
}
