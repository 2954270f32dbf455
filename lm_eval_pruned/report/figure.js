// Draws the figure of the page and follows its controls. Everything that is drawn was decided
// in Python: here a specification is picked, given the width of the page, and shown.
"use strict";
for (const figure of document.querySelectorAll("[data-figure]")) {
  const data = JSON.parse(document.getElementById(figure.dataset.figure).textContent);
  const form = figure.querySelector("form");
  const place = figure.querySelector(".panels");
  let views = [];
  let turn = 0;

  const chosen = (name) => [...form.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value);

  async function draw() {
    const mine = ++turn;
    place.setAttribute("aria-busy", "true");
    const [series] = chosen("series");
    const [measure] = chosen("measure");
    const [axis] = chosen("axis");
    const { points, panels } = data.series[series];
    const shown = panels[measure];
    figure.querySelector(".none").hidden = shown.length > 0;
    const boxes = shown.map((panel) => {
      const box = document.createElement("div");
      const title = document.createElement("h4");
      const drawing = document.createElement("div");
      title.textContent = panel.title;
      box.append(title, drawing);
      return { box, drawing };
    });
    views.forEach((view) => view.finalize());
    views = [];
    place.replaceChildren(...boxes.map(({ box }) => box));
    for (const [number, { drawing }] of boxes.entries()) {
      const spec = {
        ...(shown[number].specs[axis] ?? Object.values(shown[number].specs)[0]),
        width: Math.max(120, drawing.clientWidth - data.margins),
        datasets: { points },
      };
      const view = await vegaEmbed(drawing, spec, {
        renderer: "svg",
        actions: false,
        // Interpreted, because the page's policy forbids to compile.
        ast: true,
        defaultStyle: false,
        tooltip: { disableDefaultStyle: true },
      });
      if (mine !== turn) return view.finalize();
      views.push(view);
    }
    await filter();
    if (mine === turn) place.setAttribute("aria-busy", "false");
  }

  function filter() {
    const families = chosen("family");
    return Promise.all(views.map(({ view }) => view.signal("shown", families).runAsync()));
  }

  form.addEventListener("change", (event) => (event.target.name === "family" ? filter() : draw()));
  form.addEventListener("submit", (event) => event.preventDefault());
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    draw();
  }).observe(place);
  form.hidden = false;
}
