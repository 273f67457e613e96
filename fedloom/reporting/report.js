(() => {
  "use strict";
  const format = (value, unit) => {
    if (unit === "percent") return (100 * value).toFixed(1) + "\u00a0%";
    if (unit === "loss") return value.toFixed(3);
    if (unit === "duration") return value < 60 ? value.toFixed(1) + " s" : Math.floor(value / 60) + " min " + Math.round(value % 60) + " s";
    const units = ["B", "kB", "MB", "GB", "TB"];
    let step = 0;
    while (value >= 999.95 && step < 4) { value /= 1000; step += 1; }
    return value.toFixed(step ? 1 : 0) + " " + units[step];
  };

  // The readout: under the pointer, the values of the nearest round.
  for (const svg of document.querySelectorAll("svg[data-plot]")) {
    const [left, right, , , first, last] = JSON.parse(svg.dataset.plot);
    const series = [...svg.querySelectorAll(".series")].map((group) => {
      const shape = group.querySelector("path, rect");
      return { group, shape, name: group.dataset.name, values: new Map(JSON.parse(group.dataset.values)) };
    });
    const rounds = [...new Set(series.flatMap((s) => [...s.values.keys()]))];
    const cursor = svg.querySelector(".cursor");
    const box = document.createElement("div");
    box.className = "readout";
    box.hidden = true;
    svg.parentElement.append(box);
    const hide = () => { box.hidden = true; cursor.style.visibility = "hidden"; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const area = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / area.width;
      const x = (event.clientX - area.left) * scale;
      if (x < left - 12 || x > right + 12) return hide();
      const wanted = first + ((x - left) / (right - left)) * (last - first);
      const round = rounds.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      const at = left + ((round - first) / (last - first)) * (right - left);
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.style.visibility = "visible";
      const shown = series.filter((s) => s.values.has(round) && !s.group.classList.contains("off"));
      if (!svg.querySelector(".bars")) shown.sort((a, b) => b.values.get(round) - a.values.get(round));
      const title = document.createElement("strong");
      title.textContent = svg.querySelector(".axis").textContent + " " + round;
      const rows = shown.slice(0, 12).map((s) => {
        const row = document.createElement("div");
        const mark = document.createElement("i");
        const style = getComputedStyle(s.shape);
        mark.style.background = s.shape.tagName === "path" ? style.stroke : style.fill;
        mark.style.opacity = s.shape.tagName === "path" ? 1 : style.fillOpacity;
        const value = document.createElement("b");
        value.textContent = format(s.values.get(round), svg.dataset.unit);
        row.append(mark, s.name, value);
        return row;
      });
      if (shown.length > 12) rows.push(Object.assign(document.createElement("div"), { textContent: `and ${shown.length - 12} more` }));
      box.replaceChildren(title, ...rows);
      box.hidden = false;
      const room = svg.parentElement.clientWidth - box.offsetWidth;
      const place = at / scale + 14;
      box.style.left = Math.max(0, place > room ? at / scale - box.offsetWidth - 14 : place) + "px";
    });
  }

  // Names switch their lines off and on, in every drawing of the same figure.
  const toggle = (name) => {
    const figure = name.closest("figure");
    const on = name.getAttribute("aria-pressed") !== "true";
    for (const other of figure.querySelectorAll("[data-toggle]")) {
      if (other.dataset.toggle === name.dataset.toggle) other.setAttribute("aria-pressed", String(on));
    }
    for (const series of figure.querySelectorAll(".series")) {
      if (series.dataset.name === name.dataset.toggle) series.classList.toggle("off", !on);
    }
  };
  const point = (name, on) => {
    for (const series of name.closest("figure").querySelectorAll(".series")) {
      series.classList.toggle("dim", on && series.dataset.name !== name.dataset.toggle);
    }
  };
  for (const name of document.querySelectorAll("[data-toggle]")) {
    name.addEventListener("click", () => toggle(name));
    name.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      toggle(name);
    });
    for (const [type, on] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]]) {
      name.addEventListener(type, () => point(name, on));
    }
  }

  // Paper cannot be unfolded: print opens what is folded, except the numbers behind the charts.
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not(.numbers)")) fold.open = true;
  });
})();
