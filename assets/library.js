/* The library's search bar, and the panel beside its cards. */
(() => {
  "use strict";
  const { el, actions } = window.intarsia;
  const FILTERS = { family: "All models", algorithm: "All kinds", tag: "All tags" };
  const WAIT = 180;   // milliseconds without a key before the library is searched

  /* Made once, so that nothing is lost while one types; the filters' choices follow what is found. */
  function libraryBar(element, props, trigger, watch) {
    const box = element.querySelector(".library-bar");
    const search = el("input", "search");
    Object.assign(search, { type: "search", placeholder: "Search names, words, tags, notes", autocomplete: "off" });
    search.setAttribute("aria-label", "Search the library");
    const choices = {};
    const choice = (name, label) => {
      const select = el("select");
      select.setAttribute("aria-label", label);
      select.addEventListener("change", ask);
      choices[name] = select;
      return select;
    };
    const toggle = (label) => {
      const button = el("button", "btn toggle", label);
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
        ask();
      });
      return button;
    };
    const on = (button) => button.getAttribute("aria-pressed") === "true";
    const favourite = toggle("Favourites");
    const trashed = toggle("Trash");
    const count = el("p", "soft found");
    count.setAttribute("role", "status");
    let waiting = 0;
    function ask() {
      clearTimeout(waiting);
      const told = { text: search.value, favourite: on(favourite), trashed: on(trashed) };
      for (const [name, select] of Object.entries(choices)) told[name] = select.value;
      trigger("query", { told });
    }
    search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(ask, WAIT); });
    const row = el("div", "filters");
    row.append(search, choice("family", "Model family"), choice("algorithm", "Kind"), choice("tag", "Tag"),
      choice("sort", "Order"), favourite, trashed);
    box.replaceChildren(row, count);

    const fill = (select, options, chosen) => {
      if (document.activeElement === select && select.value === chosen) return;   // not under an open list
      const kept = options.some(([value]) => value === chosen) || !chosen ? options : [...options, [chosen, chosen, 0]];
      select.replaceChildren(...kept.map(([value, label, number]) => {
        const option = el("option", "", number === undefined ? label : `${label} (${number.toLocaleString("en")})`);
        option.value = value;
        return option;
      }));
      select.value = chosen;
    };
    function draw() {
      const value = props.value;
      if (!value?.view) return;
      for (const [name, all] of Object.entries(FILTERS)) {
        fill(choices[name], [["", all], ...value[name]], value.view[name]);
        choices[name].classList.toggle("on", Boolean(value.view[name]));
      }
      fill(choices.sort, value.sort, value.view.sort);
      if (document.activeElement !== search) search.value = value.view.text;
      favourite.setAttribute("aria-pressed", String(value.view.favourite));
      trashed.setAttribute("aria-pressed", String(value.view.trashed));
      trashed.textContent = value.trash ? `Trash (${value.trash})` : "Trash";
      count.textContent = value.found;
    }
    watch("value", draw);
    draw();
  }

  /* What is open beside the cards: it takes the focus when it comes, and gives it back when it goes. */
  function panel(element, trigger, watch) {
    let shown = "";
    let opener = "";
    actions(element, trigger);
    element.addEventListener("submit", (event) => event.preventDefault());
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
      event.preventDefault();
      event.target.closest("form")?.querySelector("[data-act]")?.click();
    });
    watch("value", () => requestAnimationFrame(() => {
      const now = element.querySelector(".panel")?.dataset.panel ?? "";   // the effect's part has none
      if (now === shown) return;
      shown = now;
      if (!now) { document.querySelector(opener)?.focus(); return; }
      const [act, name] = now.split(" ");
      opener = `#library [data-act="${act}"][data-name="${CSS.escape(name)}"]`;
      element.querySelector("h3")?.focus();
    }));
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector('#library-panel [data-act="close"]')?.click();
  });

  Object.assign(window.intarsia, { libraryBar, panel });
})();
