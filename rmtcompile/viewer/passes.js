// The passes of the compiler: operations before and after, and their texts.

function initPasses(panel) {
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
      `<tr><td class="num quiet">${i}</td><td>${p.text === null ? `<b>${esc(p.name)}</b>` : `<button class="link" data-pass="${i}" title="Show what it changed in the text">${esc(p.name)}</button>`}</td>` +
      `<td class="num">${first ? "" : `${was.toLocaleString("en")} → `}<b>${is.toLocaleString("en")}</b></td>` +
      `<td style="width:160px"><i class="bar was" style="width:${(100 * was) / most}%"></i><i class="bar" style="width:${(100 * is) / most}%"></i></td>` +
      `<td><div class="chips">${chips.join("") || `<span class="quiet">same operations</span>`}</div>${p.note ? `<p class="quiet">${esc(p.note)}</p>` : ""}</td>` +
      `<td class="num">${p.seconds ? micros(p.seconds * 1e6) : ""}</td></tr>`
    );
  });
  panel.innerHTML =
    `<h2>How the program was compiled</h2><p class="quiet" style="margin:2px 0 8px">Each pass, with the number of operations in the program before it and after it.</p>` +
    `<table class="pipe"><thead><tr><th></th><th>pass</th><th class="num">operations</th><th></th><th>what changed</th><th class="num">took</th></tr></thead><tbody>${rows.join("")}</tbody></table>${textsHtml()}`;
  return withText.length ? initTexts(panel) : null;
}

const withText = V.passes.map((p, i) => i).filter((i) => V.passes[i].text !== null);
const EQUAL_LINES = 3; // that are shown around a difference

function textsHtml() {
  if (!withText.length) return "";
  const options = withText.map((i) => `<option value="${i}">${i} ${esc(V.passes[i].name)}</option>`).join("");
  return (
    `<h2 class="below" id="texts-h">The program as text</h2><div class="codehead" style="margin-top:6px">` +
    `<label class="quiet">after <select id="pass-to"><option value="">no pass</option>${options}</select></label>` +
    `<label class="quiet">compared with <select id="pass-from"><option value="">nothing</option>${options}</select></label>` +
    `<label class="quiet"><input type="checkbox" id="pass-all"> equal lines, too</label></div>` +
    `<p class="quiet" id="pass-note" style="margin-bottom:6px"></p>` +
    `<div class="code diff" id="pass-text" tabindex="0" role="region" aria-label="Text of a pass" hidden></div>`
  );
}

function initTexts(panel) {
  const chosen = (id) => ($(id).value === "" ? null : Number($(id).value));
  ["pass-to", "pass-from"].forEach((id) =>
    $(id).addEventListener("change", () => setPasses(chosen("pass-to"), chosen("pass-from"))),
  );
  const draw = () => {
    if (!panel.hidden) renderTexts();
  };
  $("pass-all").addEventListener("change", draw);
  panel.addEventListener("click", (e) => {
    const name = e.target.closest("[data-pass]");
    if (!name) return;
    const at = withText.indexOf(Number(name.dataset.pass));
    setPasses(withText[at], at ? withText[at - 1] : null);
    $("texts-h").scrollIntoView();
  });
  watch((what) => {
    if (what === "pass") draw();
  });
  return draw;
}

/** The lines of a pass's text, as many as are compared, and how many there are. */
function linesOf(pass) {
  const lines = V.texts[V.passes[pass].text].split("\n");
  return [lines.slice(0, DIFF_LINES), lines.length];
}

/** What is shown of differences: [sign, line], and [null, number] for equal lines that are left out. */
function folds(found, whole) {
  if (whole) return found;
  const near = new Uint8Array(found.length);
  found.forEach(([sign], i) => {
    if (sign !== " ") near.fill(1, Math.max(0, i - EQUAL_LINES), i + EQUAL_LINES + 1);
  });
  const out = [];
  found.forEach((line, i) => {
    const last = out[out.length - 1];
    if (near[i]) out.push(line);
    else if (last && last[0] === null) last[1] += 1;
    else out.push([null, 1]);
  });
  return out;
}

const DIFF_CLASSES = { "+": "add", "-": "del", " ": "" };

function renderTexts() {
  const known = (i) => (withText.includes(i) ? i : null);
  const [to, from] = [known(state.pass), known(state.from)];
  $("pass-to").value = to === null ? "" : to;
  $("pass-from").value = from === null ? "" : from;
  $("pass-text").hidden = to === null;
  if (to === null) {
    $("pass-note").textContent = "Choose a pass, here or in the table, or two of them to compare.";
    return;
  }
  const [after, total] = linesOf(to);
  const [before, was] = from === null ? [[], 0] : linesOf(from);
  const found = from === null ? after.map((line) => [" ", line]) : diffLines(before, after);
  const number = (sign) => found.filter(([s]) => s === sign).length;
  const cut = Math.max(total, was) > DIFF_LINES ? ` Only the first ${DIFF_LINES.toLocaleString("en")} are shown.` : "";
  $("pass-note").textContent =
    (from === null
      ? `${count(total, "line")}.`
      : number("+") + number("-")
        ? `${count(number("+"), "line")} added, ${number("-").toLocaleString("en")} removed, ${number(" ").toLocaleString("en")} equal.`
        : "The texts are equal.") + cut;
  $("pass-text").innerHTML = folds(found, from === null || $("pass-all").checked)
    .map(([sign, line]) =>
      sign === null
        ? `<span class="line fold">${count(line, "equal line")}</span>`
        : `<span class="line ${DIFF_CLASSES[sign]}"><i>${sign}</i>${esc(line)}</span>`,
    )
    .join("");
}
