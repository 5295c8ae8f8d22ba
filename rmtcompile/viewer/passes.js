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
