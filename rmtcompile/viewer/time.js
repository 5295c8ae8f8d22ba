// Where the time goes.

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
    `${micros(total / (G.layers * G.segments))} a cell; the slowest level is ${slowest} (${micros(p.levelUs[slowest])}).${used} A level includes what happens to the segment that enters and to the one that leaves.${bandTimes.length ? " It takes as long as on the device that is slowest there." : ""}</p>` +
    `<div class="whole">${timelineHtml()}</div><div class="times"><div><h3 style="margin-top:0">Time of each level</h3><canvas id="timechart" role="img" aria-label="Measured time of each level"></canvas></div><div>` +
    `<h3 style="margin-top:0">By phase</h3>${phases.map(([n, t]) => hbar(`${PHASE_WORDS[n]}, ${count(G.phases[n][1] - G.phases[n][0], "level")}`, t, total, longest, n)).join("")}` +
    (p.outsideUs ? hbar("outside of levels", p.outsideUs, total, longest, "outside") : "") +
    (spent.length
      ? `<h3>By kind of operation</h3>${spent.map(([k, t]) => hbar(k, t, kindTotal, spent[0][1])).join("")}`
      : "") +
    `</div></div>${bandsHtml()}${backwardHtml()}<details><summary>All levels as a table</summary>${levelTable()}</details>`;
  const draw = () => {
    if (panel.hidden) return;
    drawTimes();
    drawTimeline();
  };
  initTimeline(panel);
  dragLevels($("timechart"), 52, 8);
  watch((what) => {
    if (what === "level" || what === "theme") draw();
  });
  window.addEventListener("resize", draw);
  return draw;
}

/** Backward, which goes from the last level to the first: what each level takes there and back. */
function backwardHtml() {
  const back = V.profile.backwardUs;
  if (!back.length) return "";
  const series = [
    { name: `forward, ${micros(totalTime())}`, ys: V.profile.levelUs, colour: "--accent" },
    { name: `backward, ${micros(sum(back))} in levels`, ys: back, colour: "--down" },
  ];
  const xs = back.map((_, t) => t);
  const label = "Time of each level forwards and backwards";
  return `<h3>Forwards and backwards</h3>${plotHtml({ id: "backward", label, xs, series, shown: micros, under: "level" })}${keyHtml(series)}`;
}

function levelTable() {
  const p = V.profile,
    used = p.utilisation.length > 0,
    back = p.backwardUs.length > 0;
  const rows = p.levelUs.map(
    (us, t) =>
      `<tr><td class="num">${t}</td><td>${PHASE_WORDS[phaseOf(t)]}</td><td class="num">${widths[t]}</td><td class="num">${callsOf(t)}</td>` +
      `<td class="num">${micros(us)}</td><td class="num">${micros(us / widths[t])}</td>${used ? `<td class="num">${percent(p.utilisation[t], 1)}</td>` : ""}` +
      `${back ? `<td class="num">${micros(p.backwardUs[t])}</td>` : ""}</tr>`,
  );
  return (
    `<table class="levels"><thead><tr><th class="num">level</th><th>phase</th><th class="num">cells</th><th class="num">calls</th><th class="num">time</th><th class="num">a cell</th>` +
    `${used ? `<th class="num">of peak</th>` : ""}${back ? `<th class="num">backward</th>` : ""}</tr></thead><tbody>${rows.join("")}</tbody></table>`
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
    6,
    tall + 13,
  );
}
