// Draws the chosen chart of a figure as wide as the page. What is drawn was decided in Python.
"use strict";
for (const figure of document.querySelectorAll("[data-charts]")) {
  const select = figure.querySelector("select");
  const place = figure.querySelector(".drawing");
  let width = 0;

  async function draw() {
    place.setAttribute("aria-busy", "true");
    for (const text of figure.querySelectorAll("figcaption")) text.hidden = text.dataset.of !== select.value;
    const chart = JSON.parse(document.getElementById(select.value).textContent);
    chart.columns = width > 720 ? Math.min(2, chart.concat.length) : 1;
    chart.config.view.continuousWidth = Math.max(120, width / chart.columns - 90);
    chart.config.legend.columns = Math.max(1, Math.floor(width / 260));
    await vegaEmbed(place, chart, {
      renderer: "svg",
      actions: false,
      // Interpreted, because the page's policy forbids compiling.
      ast: true,
      defaultStyle: false,
      tooltip: { disableDefaultStyle: true },
    });
    place.setAttribute("aria-busy", "false");
  }

  select.addEventListener("change", draw);
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    draw();
  }).observe(figure);
  select.closest("label").hidden = false;
}
