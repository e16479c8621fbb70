/* The report's script: chooses a layer, and says what is under the pointer. Everything can be read without it. */
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const format = (v) => (v === null || v === undefined ? "—" : Math.abs(v) >= 1000 ? v.toFixed(0) : String(+v.toPrecision(4)));
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const place = (svg, event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [at.x, at.y];
  };
  const colour = (share, two) => {
    if (share === null) return "transparent";
    const blue = !two || share >= 0.5;
    const strength = 0.72 * (two ? Math.abs(share - 0.5) * 2 : share);
    return `rgba(${blue ? "0,114,178" : "213,94,0"},${strength.toFixed(3)})`;
  };

  /* A copy in a folder may have been moved since: its page knows where it lies. */
  if (/^(https?|file):$/.test(location.protocol)) {
    const here = new URL(".", location.href);
    const folder = (here.protocol === "file:" ? decodeURIComponent(here.pathname) : here.href).replace(/\/+$/, "");
    for (const place of document.querySelectorAll("[data-here]")) {
      place.textContent = JSON.stringify([folder, place.dataset.here].filter(Boolean).join("/"));
    }
  }

  const groups = [];
  for (const section of document.querySelectorAll("section.group")) {
    const source = section.querySelector("script.lz-data");
    const slider = section.querySelector(".bar input");
    if (!source || !slider) continue; // nothing of it has layers
    const data = JSON.parse(source.textContent);
    const output = section.querySelector(".bar output");
    const now = section.querySelector(".bar .now");
    let layer = data.layer;

    const charts = [...section.querySelectorAll("svg.chart")].map((svg) => ({ svg, of: data.charts[+svg.closest("figure").dataset.n] }));
    const maps = [...section.querySelectorAll("figure.tokens")].map((figure) => ({
      figure, of: data.maps[+figure.dataset.n], svg: figure.querySelector("svg.cells"), words: [...figure.querySelectorAll(".words b")], token: 0,
    }));
    const grids = [...section.querySelectorAll("figure.coverage")].map((figure) => ({
      of: data.coverage[+figure.dataset.n], svg: figure.querySelector("svg.cells"),
    }));

    const told = (chart, i) => chart.series.map(([name, values]) => `${name}: ${format(values[i])}`).join("\n");
    const shown = (element) => !element.closest("[hidden]");

    const paint = () => {
      for (const map of maps) {
        const row = map.of.layers.indexOf(layer);
        map.svg.querySelector(".chosen").style.display = row < 0 ? "none" : "";
        const [, height] = map.svg.dataset.cell.split(" ").map(Number);
        map.svg.querySelector(".chosen").setAttribute("y", (map.of.layers.length - 1 - row) * height);
        map.words.forEach((word, i) => { word.style.background = row < 0 ? "" : colour(map.of.shares[row][i], map.of.two); });
      }
      for (const { svg, of } of grids) {
        const row = of.layers.indexOf(layer);
        const [, height] = svg.dataset.cell.split(" ").map(Number);
        svg.querySelector(".chosen").style.display = row < 0 ? "none" : "";
        svg.querySelector(".chosen").setAttribute("y", (of.layers.length - 1 - row) * height);
      }
      for (const { svg, of } of charts) {
        const i = of.layers.indexOf(layer);
        const cursor = svg.querySelector(".cursor");
        cursor.style.display = i < 0 ? "none" : "";
        if (i >= 0) { cursor.setAttribute("x1", of.x[i]); cursor.setAttribute("x2", of.x[i]); }
      }
    };
    const say = () => {
      output.textContent = `layer ${layer}`;
      slider.setAttribute("aria-valuetext", `layer ${layer}`);
      now.textContent = charts.filter(({ svg, of }) => shown(svg) && of.layers.includes(layer))
        .map(({ of }) => told(of, of.layers.indexOf(layer)).replaceAll("\n", ", ")).join(" · ");
    };
    const choose = (wanted) => {
      const i = Math.max(0, Math.min(data.layers.length - 1, wanted));
      layer = data.layers[i];
      slider.value = i;
      section.dataset.layer = layer;
      paint();
      say();
    };
    const step = (by) => choose(data.layers.indexOf(layer) + by);

    slider.addEventListener("input", () => choose(+slider.value));
    for (const { svg, of } of charts) {
      const nearest = (event) => {
        const [x] = place(svg, event);
        return of.x.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(of.x[best] - x) ? i : best), 0);
      };
      svg.addEventListener("pointermove", (event) => {
        const i = nearest(event);
        show(`layer ${of.layers[i]}\n${told(of, i)}`, event.clientX, event.clientY);
      });
      svg.addEventListener("pointerleave", hide);
      svg.addEventListener("click", (event) => choose(data.layers.indexOf(of.layers[nearest(event)])));
    }
    const cellAt = (svg, event, rows) => {
      const [width, height] = svg.dataset.cell.split(" ").map(Number);
      const [x, y] = place(svg, event);
      return [rows - 1 - Math.floor(y / height), Math.floor((x - +svg.dataset.left) / width)];
    };
    for (const { svg, of } of grids) {
      svg.addEventListener("pointermove", (event) => {
        const [row, bin] = cellAt(svg, event, of.shares.length);
        const share = (of.shares[row] || [])[bin];
        if (share === undefined) return hide();
        const [from, to] = [of.edges[bin], of.edges[bin + 1] - 1];
        const which = of.layers.length ? `layer ${of.layers[row]}, ` : "";
        show(`${which}prompt${from === to ? ` ${from}` : `s ${from}–${to}`}\n${format(100 * share)} % stored`, event.clientX, event.clientY);
      });
      svg.addEventListener("pointerleave", hide);
      svg.addEventListener("click", (event) => {
        const [row] = cellAt(svg, event, of.shares.length);
        if (of.layers[row] !== undefined) choose(data.layers.indexOf(of.layers[row]));
      });
    }
    for (const map of maps) {
      const { of, svg, words, figure } = map;
      const tell = (row, token, x, y) => {
        const value = (of.values[row] || [])[token];
        if (value === undefined) return hide();
        words.forEach((word, i) => word.classList.toggle("at", i === token));
        map.token = token;
        show(`${of.tokens[token]}${of.marks[token] ? ` (${of.marks[token]})` : ""}\nlayer ${of.layers[row]}, ${of.what}: ${format(value)}`, x, y);
      };
      const leave = () => { hide(); words.forEach((word) => word.classList.remove("at")); };
      svg.addEventListener("pointermove", (event) => {
        const [row, token] = cellAt(svg, event, of.layers.length);
        tell(row, token, event.clientX, event.clientY);
      });
      svg.addEventListener("pointerleave", leave);
      svg.addEventListener("click", (event) => {
        const [row] = cellAt(svg, event, of.layers.length);
        if (of.layers[row] !== undefined) choose(data.layers.indexOf(of.layers[row]));
      });
      words.forEach((word, i) => {
        word.addEventListener("pointermove", (event) => tell(of.layers.indexOf(layer), i, event.clientX, event.clientY));
        word.addEventListener("pointerleave", leave);
      });
      const grid = figure.querySelector(".walk");
      const here = () => {
        const word = words[map.token];
        if (!word) return;
        const box = word.getBoundingClientRect();
        tell(of.layers.indexOf(layer), map.token, box.left, box.bottom - 10);
      };
      grid.addEventListener("focus", here);
      grid.addEventListener("blur", leave);
      grid.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
        if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        event.stopPropagation();
        map.token = Math.max(0, Math.min(words.length - 1, map.token + by[0]));
        if (by[1]) step(by[1]);
        here();
        now.textContent = tip.textContent.replaceAll("\n", " · ");
      });
    }
    for (const pick of section.querySelectorAll("select.pick")) {
      const figures = [...section.querySelectorAll(`figure[data-of="${pick.dataset.of}"]`)];
      const turn = () => { figures.forEach((figure, i) => { figure.hidden = i !== pick.selectedIndex; }); say(); };
      pick.addEventListener("change", turn);
      turn();
    }
    groups.push({ section, step });
    section.classList.add("ready");
    choose(data.layers.indexOf(layer));
  }

  /* Arrow keys choose the layer of the group that is in view, wherever the focus is, unless something there uses them itself. */
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !groups.length) return;
    const seen = ({ section }) => {
      const box = section.getBoundingClientRect();
      return Math.min(box.bottom, innerHeight) - Math.max(box.top, 0);
    };
    groups.reduce((best, one) => (seen(one) > seen(best) ? one : best)).step(by);
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
})();
