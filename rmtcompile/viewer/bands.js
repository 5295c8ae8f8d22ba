// Bands: layers on devices of their own; the borders in the grid, and the timeline with a row a band.

const bandOf = (l) => G.bands.findIndex(([a, b]) => l >= a && l < b);
const bandTimes = V.profile ? V.profile.bands : [];
const bandLayers = ([a, b]) => (b - a > 1 ? `layers ${a}–${b - 1}` : `layer ${a}`);
const bandName = (p) => `band ${p}, ${bandLayers(G.bands[p])}`;

/** The lines between bands, over the cells. */
function drawBorders(ctx) {
  ctx.strokeStyle = palette.ink;
  ctx.lineWidth = 1.5;
  ctx.setLineDash([6, 3]);
  G.bands.slice(1).forEach(([first]) => {
    const y = corner([0, first - 1])[1] - box.gap / 2;
    ctx.beginPath();
    ctx.moveTo(4, y);
    ctx.lineTo(PAD.left + box.w * G.segments, y);
    ctx.stroke();
  });
  ctx.setLineDash([]);
}

/** The names of the bands, upright at the left of their layers, as far as there is room. */
function drawBandNames(ctx) {
  ctx.fillStyle = palette.soft;
  ctx.font = "11px system-ui, sans-serif";
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  G.bands.forEach(([a, b], p) => {
    const high = (b - a) * box.h;
    if (high < 10) return;
    ctx.save();
    ctx.translate(9, corner([0, b - 1])[1] + high / 2);
    if (high >= 46) ctx.rotate(-Math.PI / 2);
    ctx.fillText(high >= 46 ? `band ${p}` : p, 0, 0);
    ctx.restore();
  });
}

/** What bands there are, in one sentence. */
function bandsLead() {
  if (G.bands.length < 2) return "";
  const behind = G.lag ? "each a level behind the one before" : "all on the same level";
  return ` The layers run in <b>${count(G.bands.length, "band")}</b>, ${behind}.`;
}

/** What the time of each band was spent on. */
function bandsHtml() {
  if (!bandTimes.length) return "";
  const rows = bandTimes.map(
    (b, p) =>
      `<tr><td>${bandName(p)}</td><td>${esc(b.place)}</td>` +
      [b.busyUs, b.waitingUs, b.rampsUs]
        .map((us) => `<td class="num">${micros(us)} <span class="quiet">${percent(us, b.totalUs)}</span></td>`)
        .join("") +
      `<td class="num">${micros(b.totalUs)}</td></tr>`,
  );
  const places = bandTimes.map((b) => b.place),
    shared = [...new Set(places.filter((place, p) => places.indexOf(place) !== p))];
  const turns = shared.length ? ` Bands share ${esc(listed(shared))}: their levels come one after the other.` : "";
  return (
    `<h3>By band</h3><p class="quiet">In the proportions of a call whose levels are launched one by one.${turns}</p><table id="bands"><thead><tr><th>band</th><th>where</th><th class="num">busy</th><th class="num">waiting</th>` +
    `<th class="num">before and after</th><th class="num">in all</th></tr></thead><tbody>${rows.join("")}</tbody></table>`
  );
}

// -- the timeline

const BAND_HIGH = 30;
/** The level that a band runs at a time, or the next one; the highest band is drawn on top. */
function spanAt(y, us) {
  const row = Math.max(0, Math.min(bandTimes.length - 1, Math.floor(y / BAND_HIGH))),
    p = bandTimes.length - 1 - row,
    spans = bandTimes[p].spans;
  return [p, spans.find(([, , end]) => us <= end) || spans[spans.length - 1]];
}

function drawBandRows(ctx, wide, x, { from, to }) {
  bandTimes.forEach((band, p) => {
    const top = (bandTimes.length - 1 - p) * BAND_HIGH;
    ctx.fillStyle = palette.later;
    ctx.fillRect(Math.max(0, x(0)), top, Math.min(wide, x(band.totalUs)) - Math.max(0, x(0)), BAND_HIGH - 4);
    band.spans.forEach(([t, begin, end]) => {
      if (end < from || begin > to) return;
      const [left, right] = [x(begin), x(end)],
        w = Math.max(0.5, right - left - (right - left > 3 ? 1 : 0));
      ctx.fillStyle = phaseColour(phaseOf(t), t !== state.level);
      ctx.fillRect(left, top, w, BAND_HIGH - 4);
      if (w <= 22) return;
      ctx.fillStyle = t === state.level ? "#10161a" : palette.number;
      ctx.textAlign = "center";
      ctx.fillText(t, (Math.max(0, left) + Math.min(wide, right)) / 2, top + BAND_HIGH / 2 - 1);
    });
    ctx.fillStyle = palette.soft;
    ctx.textAlign = "left";
    if (x(band.spans[0][1]) > 90) ctx.fillText(`band ${p}, ${band.place}`, 6, top + BAND_HIGH / 2 - 1);
  });
}

/** A level of a band, in words. */
function spanTip([p, [t, begin, end]]) {
  const before = p ? bandTimes[p - 1].spans.find(([other]) => other === t) : null;
  const behind = before ? `<br>begins ${micros(begin - before[1])} after that of band ${p - 1}` : "";
  const cells = cellsOf(t).filter(([, l]) => bandOf(l) === p).length;
  return (
    `<b>level ${t} of band ${p}: ${micros(end - begin)}</b>${PHASE_WORDS[phaseOf(t)]}, ${count(cells, "cell")}, ` +
    `on ${esc(bandTimes[p].place)}${behind}`
  );
}
