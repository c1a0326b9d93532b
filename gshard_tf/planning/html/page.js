"use strict";
// The page says everything without this; here are only choosing, filtering, sorting.
for (const box of document.querySelectorAll(".weights")) {
  const body = box.querySelector("tbody");
  const rows = [...body.rows];
  const text = box.querySelector("input");
  const role = box.querySelector("select");
  const figure = box.querySelector(".map");
  const told = box.querySelector(".told");
  box.querySelector(".controls").hidden = false;

  const choose = (row) => {
    for (const other of rows) other.removeAttribute("aria-current");
    row.setAttribute("aria-current", "true");
    for (const map of figure.querySelectorAll("[data-map]")) {
      map.hidden = map.dataset.map !== row.dataset.map;
    }
    figure.querySelector("b").textContent = row.dataset.name;
    figure.querySelector(".says").textContent = row.dataset.says;
    const names = figure.querySelector(".names");
    names.hidden = row.dataset.count === "1";
    names.querySelector("code").textContent = row.dataset.names;
  };
  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden =
        (role.value && row.dataset.role !== role.value) ||
        !row.dataset.names.toLowerCase().includes(wanted);
      if (!row.hidden) shown += 1;
    }
    told.textContent = `${shown} of ${rows.length} rows`;
  };
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) choose(row);
  });
  text.addEventListener("input", filter);
  role.addEventListener("change", filter);
  for (const button of box.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const up = head.getAttribute("aria-sort") === "descending";
      for (const th of box.querySelectorAll("thead th")) th.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = button.dataset.key;
      const order = (a, b) =>
        key === "name"
          ? b.dataset.name.localeCompare(a.dataset.name)
          : Number(b.dataset[key]) - Number(a.dataset[key]);
      rows.sort((a, b) => (up ? order(b, a) : order(a, b)));
      body.append(...rows);
    });
  }
  filter();
  // To begin with, one that is split.
  const split = rows.find((row) => !row.hidden && row.querySelector(".axis"));
  const first = split || rows.find((row) => !row.hidden) || rows[0];
  if (first) choose(first);
}
