"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const graph = JSON.parse(at("graph").textContent);
  const svg = at("drawing"), scene = at("scene"), tip = at("tip");
  const nodes = [...scene.querySelectorAll("[data-node]")];
  const edges = [...scene.querySelectorAll("[data-edge]")];
  const search = at("search"), least = at("least"), shown = at("shown");
  const near = nodes.map(() => []);
  graph.edges.forEach((edge, number) => {
    near[edge.source].push(number);
    if (edge.target !== edge.source) near[edge.target].push(number);
  });

  // Place of the picture under the window: a scale and a shift of the scene.
  let view = { scale: 1, x: 0, y: 0 };
  const places = nodes.map((node) => node.getAttribute("transform").match(/-?[\d.]+/g).map(Number));
  const start = places.map((place) => [...place]);

  const moveScene = () =>
    scene.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
  const point = (event) => {
    const matrix = svg.getScreenCTM();
    return [(event.clientX - matrix.e) / matrix.a, (event.clientY - matrix.f) / matrix.d];
  };
  const bend = ([x1, y1], [x2, y2]) => {
    if (!graph.directed) return `M${x1} ${y1}L${x2} ${y2}`;
    const by = x1 === x2 ? 60 : (x2 - x1) / 2;
    return `M${x1} ${y1}C${x1 + by} ${y1} ${x2 - by} ${y2} ${x2} ${y2}`;
  };
  const place = (number) => {
    nodes[number].setAttribute("transform", `translate(${places[number].join(" ")})`);
    for (const each of near[number]) {
      const { source, target } = graph.edges[each];
      edges[each].setAttribute("d", bend(places[source], places[target]));
    }
  };

  // The slider goes by rank, so that each step hides one edge however unequal the weights are.
  const ranked = graph.edges.map((_, number) => number);
  ranked.sort((one, two) => graph.edges[one].weight - graph.edges[two].weight);
  const hidden = new Set();
  const hide = () => {
    const first = Number(least.value);
    hidden.clear();
    ranked.slice(0, first).forEach((number) => hidden.add(number));
    edges.forEach((edge, number) => edge.classList.toggle("off", hidden.has(number)));
    const weight = ranked.length ? graph.edges[ranked[first]].weight : 0;
    shown.textContent =
      `${weight.toPrecision(3)}: ${ranked.length - first} of ${ranked.length} edges`;
  };

  let kept = null;
  const light = (number) => {
    const mine = new Set(), ends = new Set([number]);
    if (number !== null) {
      near[number].filter((each) => !hidden.has(each)).forEach((each) => {
        mine.add(each);
        ends.add(graph.edges[each].source).add(graph.edges[each].target);
      });
    }
    nodes.forEach((node, each) => node.classList.toggle("faded", number !== null && !ends.has(each)));
    edges.forEach((edge, each) => {
      edge.classList.toggle("faded", number !== null && !mine.has(each));
      edge.classList.toggle("near", mine.has(each));
    });
  };
  const find = () => {
    const asked = search.value.trim().toLowerCase();
    // A number is an expert, and 7 is not 17; anything else is a part of the name.
    const fits = (node) =>
      /^\d+$/.test(asked)
        ? node.values.some(([key, value]) => key === "expert" && value === asked)
        : node.title.toLowerCase().includes(asked);
    nodes.forEach((node, number) => {
      const found = asked !== "" && fits(graph.nodes[number]);
      node.classList.toggle("found", found);
      node.classList.toggle("faded", asked !== "" && !found);
    });
    edges.forEach((edge) => edge.classList.toggle("faded", asked !== ""));
  };

  const lines = (title, values) => [title, ...values.map(([key, value]) => `${key}: ${value}`)];
  const say = (target) => {
    if (target.node !== undefined) {
      const node = graph.nodes[target.node];
      return lines(node.title, node.values).join("\n");
    }
    const edge = graph.edges[target.edge];
    const arrow = graph.directed ? " → " : " – ";
    const ends = graph.nodes[edge.source].title + arrow + graph.nodes[edge.target].title;
    return lines(ends, edge.values).join("\n");
  };
  const aim = (event) => {
    const element = event.target.closest("[data-node], [data-edge]");
    if (!element) return null;
    const { node, edge } = element.dataset;
    return node === undefined ? { edge: Number(edge) } : { node: Number(node) };
  };
  const tell = (target, x, y) => {
    tip.hidden = target === null;
    if (target === null) return;
    tip.textContent = say(target);
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
  };

  let drag = null;
  svg.addEventListener("pointerdown", (event) => {
    const target = aim(event);
    drag = { node: target ? target.node : undefined, from: point(event), moved: false };
    svg.setPointerCapture(event.pointerId);
    svg.classList.add("moving");
  });
  svg.addEventListener("pointermove", (event) => {
    if (drag === null) {
      const target = aim(event);
      tell(target, event.clientX, event.clientY);
      if (kept === null && search.value === "") {
        light(target && target.node !== undefined ? target.node : null);
      }
      return;
    }
    const [x, y] = point(event), by = [x - drag.from[0], y - drag.from[1]];
    if (Math.hypot(...by) < 3 && !drag.moved) return;
    drag.moved = true;
    drag.from = [x, y];
    tell(null);
    if (drag.node === undefined) {
      view.x += by[0];
      view.y += by[1];
      moveScene();
    } else {
      places[drag.node][0] += by[0] / view.scale;
      places[drag.node][1] += by[1] / view.scale;
      place(drag.node);
    }
  });
  const drop = () => {
    if (drag !== null && !drag.moved && search.value === "") {
      kept = drag.node === undefined || drag.node === kept ? null : drag.node;
      light(kept);
    }
    drag = null;
    svg.classList.remove("moving");
  };
  svg.addEventListener("pointerup", drop);
  svg.addEventListener("pointercancel", () => {
    drag = null;
    svg.classList.remove("moving");
  });
  svg.addEventListener("pointerleave", () => tell(null));
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y] = point(event);
    const scale = Math.min(40, Math.max(0.2, view.scale * Math.exp(-event.deltaY / 500)));
    view.x = x - (x - view.x) * (scale / view.scale);
    view.y = y - (y - view.y) * (scale / view.scale);
    view.scale = scale;
    moveScene();
  }, { passive: false });
  nodes.forEach((node, number) => {
    node.addEventListener("focus", () => {
      if (drag !== null) return;
      const { left, bottom } = node.getBoundingClientRect();
      light(number);
      tell({ node: number }, left, bottom);
    });
    node.addEventListener("blur", () => {
      tell(null);
      light(kept);
    });
  });

  least.addEventListener("input", hide);
  search.addEventListener("input", () => {
    kept = null;
    light(null);
    find();
  });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("reset").addEventListener("click", () => {
    view = { scale: 1, x: 0, y: 0 };
    places.forEach((each, number) => {
      [each[0], each[1]] = start[number];
      place(number);
    });
    search.value = "";
    least.value = "0";
    kept = null;
    moveScene();
    hide();
    light(null);
    find();
  });
  at("controls").hidden = false;
  hide();
})();
