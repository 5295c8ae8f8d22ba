// The layer x segment grid: one canvas for the cells, one above it for the cursor and the arrows.

const PAD = { left: (kinds.length > 1 ? 74 : 58) + (G.bands.length ? 18 : 0), top: 6, bottom: 22, right: 10 };
const box = { w: 10, h: 10, gap: 1 };

function measure() {
  const room = $("scroller").clientWidth - PAD.left - PAD.right;
  const tall = Math.max(240, Math.min(430, window.innerHeight - 420));
  box.w = Math.max(4, Math.min(84, Math.floor(room / G.segments)));
  box.h = Math.max(5, Math.min(Math.max(box.w, 8), 54, Math.floor(tall / G.layers)));
  box.gap = Math.min(box.w, box.h) >= 14 ? 3 : Math.min(box.w, box.h) >= 6 ? 1 : 0;
  box.width = Math.max(PAD.left + box.w * G.segments + PAD.right, $("scroller").clientWidth);
  box.height = PAD.top + box.h * G.layers + PAD.bottom;
  $("gridbox").style.width = `${box.width}px`;
  $("gridbox").style.height = `${box.height}px`;
  Object.assign($("grid").dataset, { left: PAD.left, top: PAD.top, w: box.w, h: box.h });
}

const corner = ([s, l]) => [PAD.left + s * box.w, PAD.top + (G.layers - 1 - l) * box.h];
const middle = (cell) => {
  const [x, y] = corner(cell);
  return [x + box.w / 2, y + box.h / 2];
};

function cellAt(event) {
  const area = $("grid").getBoundingClientRect();
  const s = Math.floor((event.clientX - area.left - PAD.left) / box.w);
  const l = G.layers - 1 - Math.floor((event.clientY - area.top - PAD.top) / box.h);
  return inGrid([s, l]) ? [s, l] : null;
}

let drawnLevel = 0;
function drawCells() {
  const ctx = sized($("base"), box.width, box.height);
  drawLevels(ctx, 0, G.levels - 1);
  drawAxes(ctx);
}

/** A change of level repaints only the levels between the old one and the new one. */
function moveLevel() {
  const ctx = $("base").getContext("2d");
  const [from, to] = [Math.min(drawnLevel, state.level), Math.max(drawnLevel, state.level)];
  for (let t = from; t <= to; t += 1) {
    cellsOf(t).forEach((cell) => {
      const [x, y] = corner(cell);
      ctx.clearRect(x - 1, y - 1, box.w - box.gap + 2, box.h - box.gap + 2);
    });
  }
  // Without gaps the clearing nibbled at the neighbours.
  drawLevels(
    ctx,
    box.gap ? from : Math.max(0, from - 1 - G.alpha),
    box.gap ? to : Math.min(G.levels - 1, to + 1 + G.alpha),
  );
}

function drawLevels(ctx, from, to) {
  const round = box.gap >= 3 ? 4 : 0;
  const numbers = box.w >= 20 && box.h >= 15;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  ctx.font = `${box.h >= 22 ? 12 : 10}px system-ui, sans-serif`;
  drawnLevel = state.level;
  for (let t = from; t <= to; t += 1) {
    const phase = phaseOf(t);
    ctx.fillStyle = t > state.level ? palette.later : phaseColour(phase, t < state.level);
    ctx.beginPath();
    const cells = cellsOf(t);
    cells.forEach((cell) => {
      const [x, y] = corner(cell);
      if (round) ctx.roundRect(x, y, box.w - box.gap, box.h - box.gap, round);
      else ctx.rect(x, y, box.w - box.gap, box.h - box.gap);
    });
    ctx.fill();
    if (t === state.level && box.gap >= 3) {
      ctx.lineWidth = 1.5;
      ctx.strokeStyle = palette.ink;
      ctx.stroke();
    }
    if (numbers) {
      ctx.fillStyle = t === state.level ? "#10161a" : palette.number;
      cells.forEach((cell) => {
        const [x, y] = middle(cell);
        ctx.fillText(t, x - box.gap / 2, y - box.gap / 2 + 0.5);
      });
    }
  }
}

function drawAxes(ctx) {
  ctx.fillStyle = palette.soft;
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  const stepL = niceStep(15 / box.h);
  ctx.textAlign = "right";
  for (let l = 0; l < G.layers; l += stepL) {
    const kind = kinds.length > 1 ? ` ${kindLetter(l)}` : "";
    ctx.fillText(`layer ${l}${kind}`, PAD.left - 8, middle([0, l])[1]);
  }
  const stepS = niceStep(30 / box.w);
  ctx.textAlign = "center";
  const y = PAD.top + box.h * G.layers + 11;
  for (let s = 0; s < G.segments; s += stepS) ctx.fillText(s, middle([s, 0])[0] - box.gap / 2, y);
  ctx.textAlign = "right";
  ctx.fillText("segment", PAD.left - 8, y);
  drawBandNames(ctx);
}
const niceStep = (least) =>
  [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256].find((n) => n >= least) || 512;

function drawOver() {
  const ctx = sized($("grid"), box.width, box.height);
  const cell = state.hover || state.cell;
  drawBorders(ctx);
  linked(cell, -1).forEach(([other]) => mark(ctx, other, palette.in, 2));
  linked(cell, 1).forEach(([other]) => mark(ctx, other, palette.out, 2));
  mark(ctx, state.cell, palette.select, 2.5);
  if (state.hover) mark(ctx, state.hover, palette.select, 1.5);
  linked(cell, -1).forEach(([other]) => arrow(ctx, other, cell, palette.in));
  linked(cell, 1).forEach(([other]) => arrow(ctx, cell, other, palette.out));
}

function mark(ctx, cell, colour, weight) {
  const [x, y] = corner(cell);
  const grow = box.gap >= 3 ? 0 : 1.5;
  ctx.strokeStyle = colour;
  ctx.lineWidth = weight;
  ctx.beginPath();
  ctx.roundRect(x - grow, y - grow, box.w - box.gap + 2 * grow, box.h - box.gap + 2 * grow, 3);
  ctx.stroke();
}

function arrow(ctx, from, to, colour) {
  const [x1, y1] = middle(from),
    [x2, y2] = middle(to);
  const long = Math.hypot(x2 - x1, y2 - y1);
  const small = Math.min(box.w, box.h) < 14;
  const [ux, uy] = [(x2 - x1) / long, (y2 - y1) / long];
  // From just inside the border of one cell to just inside that of the other: the numbers stay readable.
  const border = Math.min(box.w / 2 / (Math.abs(ux) || 1e-9), box.h / 2 / (Math.abs(uy) || 1e-9));
  const cut = small ? 0 : border - Math.min(10, border / 2);
  const [ax, ay, bx, by] = [x1 + ux * cut, y1 + uy * cut, x2 - ux * cut, y2 - uy * cut];
  // Long arrows bend, so that they do not hide the cells between their ends.
  const bend = long > 1.6 * Math.max(box.w, box.h) ? 0.16 : 0;
  const [cx, cy] = [(ax + bx) / 2 + uy * long * bend, (ay + by) / 2 - ux * long * bend];
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.lineWidth = small ? 1.5 : 2;
  ctx.beginPath();
  ctx.moveTo(ax, ay);
  ctx.quadraticCurveTo(cx, cy, bx, by);
  ctx.stroke();
  const turn = Math.atan2(by - cy, bx - cx),
    head = small ? 4 : 7;
  ctx.beginPath();
  ctx.moveTo(bx, by);
  [0.45, -0.45].forEach((d) => ctx.lineTo(bx - head * Math.cos(turn + d), by - head * Math.sin(turn + d)));
  ctx.fill();
}

function showTip(event) {
  const cell = state.hover;
  $("tip").hidden = !cell;
  if (!cell) return;
  const names = (sign) =>
    linked(cell, sign)
      .map(([other, offset]) => {
        const carried = handedOn(sign < 0 ? other : cell, offset);
        return pair(other) + (carried.length ? ` by ${carried.join(", ")}` : "");
      })
      .join(", ") || "nothing";
  const others = widths[levelOf(cell)] - 1,
    sort = sortOf(cell);
  $("tip").innerHTML =
    `<b>segment ${cell[0]}, layer ${cell[1]} · level ${levelOf(cell)}</b>` +
    `${sort ? `${sort}<br>` : ""}runs ${others ? `with ${count(others, "other cell")}` : "alone"}<br>waits for ${esc(names(-1))}<br>feeds ${esc(names(1))}`;
  const left = Math.min(event.clientX + 14, window.innerWidth - 340);
  const below = event.clientY + 18 + $("tip").offsetHeight < window.innerHeight;
  $("tip").style.left = `${left}px`;
  $("tip").style.top = `${below ? event.clientY + 18 : event.clientY - 12 - $("tip").offsetHeight}px`;
}

/** Bars over the levels: how many cells run together and, with a profile, how long the level took. */
function drawStrip() {
  const canvas = $("strip"),
    wide = canvas.parentElement.clientWidth - 28;
  const rows = [{ name: "cells", values: widths, colour: (p) => phaseColour(p) }];
  if (V.profile) rows.push({ name: "time", values: V.profile.levelUs, colour: () => palette.soft });
  const tall = V.profile ? 30 : 42,
    high = rows.length * (tall + 6);
  const ctx = sized(canvas, wide, high);
  canvas.style.width = `${wide}px`;
  rows.forEach((row, i) =>
    bars(ctx, row.values, PAD.left, i * (tall + 6), wide - PAD.left - PAD.right, tall, row.colour),
  );
  ctx.fillStyle = palette.soft;
  ctx.font = "11px system-ui, sans-serif";
  ctx.textAlign = "right";
  rows.forEach((row, i) => {
    ctx.fillText(row.name, PAD.left - 8, i * (tall + 6) + 12);
    const value = row.values[state.level];
    ctx.fillText(i ? micros(value) : value, PAD.left - 8, i * (tall + 6) + 26);
  });
}

function bars(ctx, values, left, top, wide, tall, colour) {
  const step = wide / values.length,
    most = Math.max(...values) || 1;
  values.forEach((value, t) => {
    const h = Math.max(1, (value / most) * (tall - 2));
    const now = t === state.level,
      solid = now && step < 12;
    ctx.globalAlpha = now ? 1 : 0.5;
    ctx.fillStyle = solid ? palette.ink : colour(phaseOf(t));
    ctx.fillRect(left + t * step, top + tall - h, Math.max(1.5, step - (step > 4 ? 1 : 0)), h);
    if (now && !solid) {
      ctx.strokeStyle = palette.ink;
      ctx.lineWidth = 1.5;
      ctx.strokeRect(left + t * step + 0.75, top + tall - h + 0.75, step - 2.5, h - 1.5);
    }
  });
  ctx.globalAlpha = 1;
}
const levelAt = (canvas, event, left, right) => {
  const area = canvas.getBoundingClientRect();
  return Math.floor(((event.clientX - area.left - left) / (area.width - left - right)) * G.levels);
};

function dragLevels(canvas, left, right) {
  canvas.addEventListener("pointerdown", (e) => {
    canvas.setPointerCapture(e.pointerId);
    setLevel(levelAt(canvas, e, left, right));
  });
  canvas.addEventListener("pointermove", (e) => {
    if (e.buttons) setLevel(levelAt(canvas, e, left, right));
  });
}

function keepInSight() {
  const area = $("scroller");
  if (area.scrollWidth <= area.clientWidth) return;
  const middles = cellsOf(state.level).map((c) => middle(c)[0]);
  const x = (middles[0] + middles[middles.length - 1]) / 2;
  if (x < area.scrollLeft + PAD.left || x > area.scrollLeft + area.clientWidth - 40)
    area.scrollLeft = x - area.clientWidth / 2;
}

function initGrid() {
  const grid = $("grid");
  grid.addEventListener("pointermove", (e) => {
    setHover(cellAt(e));
    showTip(e);
  });
  grid.addEventListener("pointerleave", () => {
    setHover(null);
    $("tip").hidden = true;
  });
  grid.addEventListener("click", (e) => {
    const cell = cellAt(e);
    if (cell) setCell(cell);
  });
  dragLevels($("strip"), PAD.left, PAD.right);
  const all = () => {
    measure();
    drawCells();
    drawOver();
    drawStrip();
  };
  new ResizeObserver(() => requestAnimationFrame(all)).observe($("scroller"));
  watch((what) => {
    if (what === "level") {
      moveLevel();
      drawStrip();
      keepInSight();
    }
    if (what === "cell" || what === "hover") drawOver();
    if (what === "theme") all();
  });
  all();
}
