"use strict";
// Shows the values under the pointer. Everything else on the page works without it.
const tip = document.createElement("div");
tip.className = "tip";
document.body.append(tip);

function nearest(series, x) {
  let best = 0;
  for (let i = 1; i < series.x.length; i++) {
    if (Math.abs(series.x[i] - x) < Math.abs(series.x[best] - x)) best = i;
  }
  return best;
}

function row(colour, label, text) {
  const line = document.createElement("div");
  const mark = document.createElement("i");
  mark.style.background = colour ? `var(--series-${colour})` : "var(--ink)";
  const value = document.createElement("b");
  value.textContent = text;
  line.append(mark, label + " ", value);
  return line;
}

function attach(svg) {
  const all = JSON.parse(svg.dataset.hover);
  const cursor = svg.querySelector(".cursor");
  const dots = svg.querySelector(".dots");

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const at = all.map((series) => nearest(series, x));
    const main = all.reduce((a, b, i) => (Math.abs(b.x[at[i]] - x) < Math.abs(all[a].x[at[a]] - x) ? i : a), 0);
    const here = all[main].x[at[main]];
    cursor.setAttribute("x1", here);
    cursor.setAttribute("x2", here);
    svg.classList.add("active");
    const title = document.createElement("span");
    title.textContent = "step " + all[main].step[at[main]];
    tip.replaceChildren(title);
    dots.replaceChildren();
    all.forEach((series, i) => {
      if (Math.abs(series.x[at[i]] - here) > 6) return;
      const dot = document.createElementNS(svg.namespaceURI, "circle");
      dot.setAttribute("cx", series.x[at[i]]);
      dot.setAttribute("cy", series.y[at[i]]);
      dot.setAttribute("r", 3);
      dot.style.fill = series.colour ? `var(--series-${series.colour})` : "var(--ink)";
      dots.append(dot);
      tip.append(row(series.colour, series.label, series.text[at[i]]));
    });
    tip.style.display = "block";
    const left = event.clientX + 16 + tip.offsetWidth > window.innerWidth ? -16 - tip.offsetWidth : 16;
    tip.style.left = event.clientX + left + "px";
    tip.style.top = Math.min(event.clientY + 12, window.innerHeight - tip.offsetHeight - 8) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    svg.classList.remove("active");
    dots.replaceChildren();
    tip.style.display = "none";
  });
}

function attachAll(root) {
  root.querySelectorAll("svg.chart").forEach(attach);
}

attachAll(document);
