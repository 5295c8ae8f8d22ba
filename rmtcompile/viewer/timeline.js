// The timeline of the measured levels, each divided by kind of operation, or a row a band; it zooms and pans.

const TIME_HIGH = { levels: 22, kinds: 120, axis: 20 };
const shownTime = { from: 0, to: 1 }; // microseconds from the start of the first level

const levelEnds = [];
if (V.profile) V.profile.levelUs.reduce((at, us) => (levelEnds.push(at + us), at + us), 0);
const wholeTime = () => (bandTimes.length ? bandTimes[0].totalUs : levelEnds[levelEnds.length - 1]) || 1;
const levelStart = (t) => (t ? levelEnds[t - 1] : 0);
/** The level that runs at a time, by halves. */
function levelOfTime(us) {
  let [low, high] = [0, levelEnds.length - 1];
  while (low < high) {
    const mid = (low + high) >> 1;
    if (levelEnds[mid] < us) low = mid + 1;
    else high = mid;
  }
  return low;
}

const KIND_COLOURS = ["accent", "up", "steady", "down", "out", "in"];
const timedKinds = V.profile && V.profile.levelKinds.length ? kindTimes().map(([kind]) => kind) : [];
const kindColour = (i) => KIND_COLOURS[i % KIND_COLOURS.length];

const timelineHtml = () =>
  `<h3 style="margin-top:0">Timeline</h3><div class="zoom"><button data-zoom="0.5" aria-label="Closer" title="Closer (+)">+</button>` +
  `<button data-zoom="2" aria-label="Further away" title="Further away (-)">−</button><button data-zoom="0" title="All levels (0)">all</button>` +
  `<span class="quiet" id="timespan"></span></div>` +
  `<canvas id="timeline" tabindex="0" role="img" aria-label="Timeline of the levels. Plus and minus zoom, arrow keys move, zero shows all."></canvas>` +
  (timedKinds.length
    ? `<ul class="legend">${timedKinds.map((k, i) => `<li><i style="background:var(--${kindColour(i)})"></i>${esc(k)}</li>`).join("")}<li><i style="background:var(--later)"></i>between operations</li></ul>`
    : "");

/** Show another part of the time, within the whole. */
function showTime(from, to) {
  const whole = wholeTime(),
    long = Math.max(Math.min(to - from, whole), whole / 1e5);
  shownTime.from = Math.max(0, Math.min(from, whole - long));
  shownTime.to = shownTime.from + long;
  drawTimeline();
}

/** Zoom about a time, which stays where it is; a factor of 0 shows all. */
function zoomTime(factor, about) {
  if (!factor) {
    showTime(0, wholeTime());
    return;
  }
  const { from, to } = shownTime;
  showTime(about - (about - from) * factor, about + (to - about) * factor);
}

function drawTimeline() {
  const canvas = $("timeline"),
    wide = canvas.parentElement.clientWidth,
    rows = bandTimes.length ? bandTimes.length * BAND_HIGH : TIME_HIGH.levels + TIME_HIGH.kinds;
  if (!wide) return;
  const ctx = sized(canvas, wide, rows + TIME_HIGH.axis),
    { from, to } = shownTime,
    x = (us) => ((us - from) / (to - from)) * wide;
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  if (bandTimes.length) drawBandRows(ctx, wide, x, shownTime);
  else drawLevelRow(ctx, wide, x, shownTime);
  ctx.fillStyle = palette.soft;
  timeTicks(from, to).forEach((us) => {
    ctx.fillRect(x(us), rows, 1, 4);
    ctx.textAlign = x(us) < 20 ? "left" : x(us) > wide - 20 ? "right" : "center";
    ctx.fillText(us ? micros(us) : "0", x(us), rows + 12);
  });
  Object.assign(canvas.dataset, { from, to });
  $("timespan").textContent = `${micros(to - from)} of ${micros(wholeTime())}; drag to move, turn the wheel to zoom`;
}

/** The levels one after the other, each divided by kind of operation. */
function drawLevelRow(ctx, wide, x, { from, to }) {
  const { levels } = TIME_HIGH;
  for (let t = levelOfTime(from); t < G.levels && levelStart(t) <= to; t += 1) {
    const [left, right] = [x(levelStart(t)), x(levelEnds[t])],
      w = Math.max(0.5, right - left - (right - left > 3 ? 1 : 0));
    ctx.fillStyle = phaseColour(phaseOf(t), t !== state.level);
    ctx.fillRect(left, 0, w, levels - 3);
    drawKinds(ctx, t, left, w);
    if (w > 22) {
      ctx.fillStyle = t === state.level ? "#10161a" : palette.number;
      ctx.textAlign = "center";
      const [a, b] = [Math.max(0, left), Math.min(wide, right)];
      ctx.fillText(t, (a + b) / 2, levels / 2 - 1);
    }
  }
}

/** The time of a level by kind, from the bottom up; what is left is between operations. */
function drawKinds(ctx, t, left, w) {
  const { levels, kinds: high } = TIME_HIGH,
    us = V.profile.levelUs[t];
  ctx.globalAlpha = t === state.level ? 1 : 0.8;
  ctx.fillStyle = timedKinds.length ? palette.later : phaseColour(phaseOf(t), t !== state.level);
  ctx.fillRect(left, levels, w, high);
  let y = levels + high;
  timedKinds.forEach((kind, i) => {
    const h = us ? (high * (V.profile.levelKinds[t][kind] || 0)) / us : 0;
    ctx.fillStyle = palette[kindColour(i)];
    ctx.fillRect(left, y - h, w, h);
    y -= h;
  });
  ctx.globalAlpha = 1;
}

/** Round times in a span, eight at most. */
function timeTicks(from, to) {
  const rough = (to - from) / 8,
    power = 10 ** Math.floor(Math.log10(rough)),
    step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
  const out = [];
  for (let i = Math.ceil(from / step); i * step <= to; i += 1) out.push(i * step);
  return out;
}

/** What a level's time was spent on, in words. */
function kindsTip(t) {
  const took = V.profile.levelUs[t],
    rows = timedKinds.map((kind) => [kind, V.profile.levelKinds[t][kind] || 0]).filter(([, us]) => us > 0);
  return (
    `<b>level ${t}: ${micros(took)}</b>${PHASE_WORDS[phaseOf(t)]}, ${count(widths[t], "cell")}` +
    rows.map(([kind, us]) => `<br>${esc(kind)} ${micros(us)}, ${percent(us, took)}`).join("")
  );
}

function initTimeline(panel) {
  const canvas = $("timeline");
  const timeAt = (e) => {
    const area = canvas.getBoundingClientRect();
    return shownTime.from + ((e.clientX - area.left) / area.width) * (shownTime.to - shownTime.from);
  };
  const spanOf = (e) => spanAt(e.clientY - canvas.getBoundingClientRect().top, timeAt(e));
  const levelUnder = (e) => (bandTimes.length ? spanOf(e)[1][0] : levelOfTime(timeAt(e)));
  const middle = () => (shownTime.from + shownTime.to) / 2;
  shownTime.to = wholeTime();
  panel.addEventListener("click", (e) => {
    const button = e.target.closest("[data-zoom]");
    if (button) zoomTime(Number(button.dataset.zoom), middle());
  });
  canvas.addEventListener(
    "wheel",
    (e) => {
      e.preventDefault();
      const moved = Math.abs(e.deltaX) > Math.abs(e.deltaY);
      const long = shownTime.to - shownTime.from;
      if (moved) showTime(shownTime.from + (long * e.deltaX) / 800, shownTime.to + (long * e.deltaX) / 800);
      else zoomTime(2 ** Math.max(-1, Math.min(1, e.deltaY / 200)), timeAt(e));
    },
    { passive: false },
  );
  let held = null;
  canvas.addEventListener("pointerdown", (e) => {
    canvas.setPointerCapture(e.pointerId);
    held = { x: e.clientX, from: shownTime.from, to: shownTime.to, moved: false };
  });
  canvas.addEventListener("pointermove", (e) => {
    if (!held) {
      $("tip").hidden = false;
      $("tip").innerHTML = bandTimes.length ? spanTip(spanOf(e)) : kindsTip(levelUnder(e));
      $("tip").style.left = `${Math.min(e.clientX + 14, window.innerWidth - 340)}px`;
      $("tip").style.top = `${e.clientY - 12 - $("tip").offsetHeight}px`;
      return;
    }
    held.moved ||= Math.abs(e.clientX - held.x) > 3;
    if (!held.moved) return;
    $("tip").hidden = true;
    const by = ((e.clientX - held.x) / canvas.clientWidth) * (held.to - held.from);
    showTime(held.from - by, held.to - by);
  });
  canvas.addEventListener("pointerup", (e) => {
    if (held && !held.moved) setLevel(levelUnder(e));
    held = null;
  });
  canvas.addEventListener("pointercancel", () => (held = null));
  canvas.addEventListener("pointerleave", () => ($("tip").hidden = true));
  canvas.addEventListener("keydown", (e) => {
    const zooms = { "+": 0.5, "=": 0.5, "-": 2, 0: 0 },
      moves = { ArrowLeft: -0.2, ArrowRight: 0.2 };
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key in zooms) zoomTime(zooms[e.key], middle());
    else if (e.key in moves) {
      const by = moves[e.key] * (shownTime.to - shownTime.from);
      showTime(shownTime.from + by, shownTime.to + by);
    } else return;
    e.preventDefault();
  });
}
