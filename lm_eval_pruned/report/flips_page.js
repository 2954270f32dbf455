"use strict";
// Every text is set as textContent: what documents and models say is never markup.
(() => {
  const HEIGHT = 60;  // of .row in the style
  const BESIDE = 6;   // rows kept above and below what is visible
  const MARKS = ["\u2713\u2192\u2717", "\u2717\u2192\u2713", "\u2717\u2192\u2717", "\u2713\u2192\u2713"];
  const data = JSON.parse(document.getElementById("data").textContent);
  const [LEAF, NUMBER, DIGEST, PROMPT, TARGET, CHOICES, BEFORE, WRITTEN_BEFORE] = [0, 1, 2, 3, 4, 5, 6, 7];
  const [DOCUMENT, RUN, TASK, KIND, AFTER, WRITTEN_AFTER] = [0, 1, 2, 3, 4, 5];
  const get = (id) => document.getElementById(id);
  const list = get("list"), space = get("space"), detail = get("document");
  const filters = {task: TASK, run: RUN, kind: KIND};
  let shown = [], active = 0, words = [];

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const count = (number) => number.toLocaleString("en");

  const choices = (id, all, names) => {
    const column = filters[id];
    const used = new Set(data.changes.map((change) => change[column]));
    get(id).append(new Option(all, ""));
    names.forEach((name, index) => used.has(index) && get(id).append(new Option(name, index)));
  };

  // Lower-case texts of a document, made when somebody searches for the first time.
  const texts = new Array(data.documents.length);
  const textOf = (index) => {
    if (texts[index] === undefined) {
      const found = data.documents[index];
      texts[index] = [data.leaves[found[LEAF]], ...found.slice(NUMBER).flat()].join("\n").toLowerCase();
    }
    return texts[index];
  };

  const select = () => {
    const wanted = Object.entries(filters)
      .map(([id, column]) => [column, get(id).value])
      .filter(([, value]) => value !== "")
      .map(([column, value]) => [column, Number(value)]);
    words = get("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const inDocument = words.map(() => new Uint8Array(data.documents.length));
    const says = (change, word, number) => {
      const index = change[DOCUMENT];
      if (!inDocument[number][index]) inDocument[number][index] = textOf(index).includes(word) ? 1 : 2;
      if (inDocument[number][index] === 1) return true;
      return [change[AFTER], change[WRITTEN_AFTER]].some((text) => text && text.toLowerCase().includes(word));
    };
    const before = shown[active];
    shown = data.changes.filter(
      (change) => wanted.every(([column, value]) => change[column] === value) && words.every((word, i) => says(change, word, i)));
    active = Math.max(0, shown.indexOf(before));
    get("count").textContent = `${count(shown.length)} of ${count(data.changes.length)} changed answers`;
    space.style.height = `${shown.length * HEIGHT}px`;
    list.scrollTop = active * HEIGHT - HEIGHT * 2;
    draw();
    open();
  };

  const row = (position) => {
    const change = shown[position], found = data.documents[change[DOCUMENT]];
    const element = make("div", undefined, "row");
    element.id = `row-${position}`;
    element.style.top = `${position * HEIGHT}px`;
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", String(position === active));
    element.setAttribute("aria-posinset", position + 1);
    element.setAttribute("aria-setsize", shown.length);
    const first = make("div", undefined, "first");
    first.append(make("span", `${MARKS[change[KIND]]} ${data.kinds[change[KIND]]}`, `kind kind-${change[KIND]}`),
                 make("span", ` \u00b7 ${data.runs[change[RUN]]} \u00b7 ${data.leaves[found[LEAF]]}`));
    const text = data.texts ? found[PROMPT].slice(0, 400).replace(/\s+/g, " ").slice(0, 160) : found[DIGEST];
    element.append(first, make("div", `${found[NUMBER]}: ${text}`, "second"));
    return element;
  };

  const draw = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - BESIDE);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + BESIDE);
    const rows = [];
    for (let position = first; position < last; position += 1) rows.push(row(position));
    if (!shown.length) rows.push(Object.assign(make("p", "No document is like that."), {id: "none"}));
    space.replaceChildren(...rows);
    if (active >= first && active < last) list.setAttribute("aria-activedescendant", `row-${active}`);
    else list.removeAttribute("aria-activedescendant");
  };

  // A block of text in which the words that were searched for are marked.
  const block = (text, tag = "p", name = "text") => {
    const element = make(tag, undefined, name);
    const escaped = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const pattern = escaped.length ? new RegExp(`(${escaped.join("|")})`, "gi") : null;
    (pattern ? text.split(pattern) : [text]).forEach((part, index) => {
      if (part) element.append(index % 2 ? make("mark", part) : document.createTextNode(part));
    });
    return element;
  };

  // A block in which a run of blank lines, which would fill the screen, is said in words.
  const folded = (text) => {
    const element = make("p", undefined, "text");
    text.split(/((?:[^\S\n]*\n){4,}[^\S\n]*)/).forEach((part, index) => {
      if (index % 2) element.append(make("span", `\n(${count(part.split("\n").length - 1)} line breaks)\n`, "quiet"));
      else element.append(...block(part).childNodes);
    });
    return element;
  };

  const answer = (who, right, chosen, written, options) => {
    const part = make("section");
    part.append(make("h2", `${who}: ${right ? "right \u2713" : "wrong \u2717"}`));
    const text = options.length && chosen !== null ? options[Number(chosen)].trim() : chosen ?? written ?? "";
    const nothing = text === "" ? "(nothing, or not in the samples)" : "(white space alone)";
    part.append(text.trim() === "" ? make("p", nothing, "quiet") : folded(text));
    if (written !== null && chosen !== null)
      part.append(make("p", "Taken from what it wrote:", "quiet"), folded(written));
    return part;
  };

  const open = () => {
    detail.replaceChildren();
    detail.scrollTop = 0;
    if (!shown.length) return;
    const change = shown[active], found = data.documents[change[DOCUMENT]], kind = change[KIND];
    const run = data.runs[change[RUN]], leaf = data.leaves[found[LEAF]];
    const head = make("h2");
    head.append(make("span", `${MARKS[kind]} ${data.kinds[kind]}`, `kind kind-${kind}`), ` \u00b7 ${leaf} \u00b7 ${run}`);
    detail.append(head, make("p", `document ${found[NUMBER]}, hash ${found[DIGEST]}`, "quiet"));
    if (!data.texts) {
      detail.append(make("p", "The texts were left out of this report (--no_texts). Number and hash find the document in the harness's samples."));
      return;
    }
    const options = found[CHOICES], pair = make("div", undefined, "pair");
    pair.append(answer(data.base, kind === 0 || kind === 3, found[BEFORE], found[WRITTEN_BEFORE], options),
                answer(run, kind === 1 || kind === 3, change[AFTER], change[WRITTEN_AFTER], options));
    detail.append(make("h2", "Prompt"));
    if (data.shared[found[LEAF]]) {
      const shared = make("details");
      shared.append(make("summary", "What all prompts of this task begin with (not searched)"),
                    make("p", data.shared[found[LEAF]], "text"));
      detail.append(shared);
    }
    detail.append(block(found[PROMPT]), make("h2", "Expected"));
    const target = options[Number(found[TARGET])];
    const named = /^\d+$/.test(found[TARGET]) && target !== undefined;
    detail.append(block(named ? `${found[TARGET]}: ${target.trim()}` : found[TARGET]), pair);
    if (options.length) {
      const choice = make("ol");
      options.forEach((text, index) => {
        const item = make("li"), who = [];
        if (String(index) === found[BEFORE]) who.push(data.base);
        if (String(index) === change[AFTER]) who.push(run);
        item.append(make("span", index, "number"), block(text.trim(), "span", ""));
        if (who.length) item.append(make("span", `\u2190 ${who.join(", ")}`, "who"));
        choice.append(item);
      });
      detail.append(make("h2", "Choices"), choice);
    }
  };

  const go = (position) => {
    if (!shown.length) return;
    active = Math.min(Math.max(position, 0), shown.length - 1);
    const top = active * HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
    draw();
    open();
  };

  choices("task", "all tasks", data.tasks);
  choices("run", "all sizes", data.runs);
  choices("kind", "all changes", data.kinds);
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  Object.keys(filters).forEach((id) => get(id).addEventListener("change", select));
  let waiting;
  get("words").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(select, 80);
  });
  let drawing = false;
  const later = () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; draw(); });
  };
  list.addEventListener("scroll", later, {passive: true});
  new ResizeObserver(later).observe(list);
  list.addEventListener("click", (event) => {
    const element = event.target.closest(".row");
    if (!element) return;
    go(Number(element.id.slice(4)));
    if (detail.getBoundingClientRect().top > list.getBoundingClientRect().top + 1) detail.scrollIntoView();
  });
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / HEIGHT) - 1);
    const moves = {ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: shown.length - 1};
    if (event.key in moves) go(moves[event.key]);
    else if (event.key === "Enter") detail.focus();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
      event.preventDefault();
      get("words").focus();
    } else if (event.key === "Escape" && detail.contains(document.activeElement)) list.focus();
  });
  select();
})();
