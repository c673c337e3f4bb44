"use strict";
{
  // --- one table, sorted by any column, showing one topic at a time ---------------------------

  const UNITS = { B: 1, KB: 2 ** 10, MB: 2 ** 20, GB: 2 ** 30, TB: 2 ** 40 };

  // A figure as the report writes it ("97.9", "-4.7%", "35.5 KB", a deviation after it); NaN where there is none.
  function figure(text) {
    const unit = text.match(/ ([KMGT]?B)$/);
    return parseFloat(text.replace(/,/g, "")) * (unit ? UNITS[unit[1]] : 1);
  }

  function sort(table, column, sign) {
    const shown = (row) => row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const [a, b] = [figure(shown(one)), figure(shown(other))];
      if (!isNaN(a) && !isNaN(b)) return sign * (a - b);
      if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1; // what has no figure stands last
      return sign * shown(one).localeCompare(shown(other), undefined, { numeric: true });
    });
    table.tBodies[0].append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sort(table, column, up ? 1 : -1);
      });
    });
  }

  // --- charts ---------------------------------------------------------------------------------

  const drawn = JSON.parse(document.getElementById("drawn").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function draw(place) {
    const theme = dark.matches ? drawn.dark : drawn.light;
    const narrow = place.clientWidth < 560;
    const legend = narrow ? { ...theme.legend, orient: "bottom", columns: 2 } : theme.legend;
    const spec = {
      ...drawn.charts[place.dataset.chart],
      width: "container",
      autosize: { type: "fit-x", contains: "padding" },
    };
    const options = {
      config: { ...theme, legend },
      actions: false,
      ast: true, // expressions are interpreted: the page's policy forbids making code of text
      defaultStyle: false,
      renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    };
    vegaEmbed(place, spec, options).then(
      () => place.parentElement.classList.add("drawn"),
      (error) => console.error(error), // the picture below stays
    );
  }

  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);
  dark.addEventListener("change", drawAll);
  drawAll();
}
