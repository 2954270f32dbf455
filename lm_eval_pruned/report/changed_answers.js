// Shows the rows that hold every word of the search field.
"use strict";
const rows = [...document.querySelectorAll("tbody tr")];
const texts = rows.map((row) => row.textContent.toLowerCase());
document.forms[0].addEventListener("submit", (event) => event.preventDefault());
document.forms[0].addEventListener("input", ({ target }) => {
  const words = target.value.toLowerCase().split(/\s+/);
  rows.forEach((row, n) => { row.hidden = !words.every((word) => texts[n].includes(word)); });
  document.querySelector("output").textContent = rows.filter((row) => !row.hidden).length;
});
