"use strict";
const scene = JSON.parse(document.getElementById("scene").textContent);
const F = Object.fromEntries(scene.fields.map((name, index) => [name, index]));
const tasks = scene.tasks, servers = scene.servers, root = document.documentElement;
const find = (id) => document.getElementById(id);
const canvas = find("hall"), chart = find("gantt"), slider = find("time"), play = find("play"), speed = find("speed");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
let now = scene.start, playing = false, last = 0, carried = 0, chosen = -1, rects = new Map(), places = [];
const get = (task, name) => task[F[name]];
const DROPPED = "dropped", LEFT_IS = scene.shared ? "until all there has ended" : "of work left per GPU";

function colour(name) { return getComputedStyle(root).getPropertyValue("--" + name).trim(); }

function ramp(rate) {
  const stops = scene.ramp[root.dataset.theme === "dark" ? "dark" : "light"];
  const [low, high] = scene.rates;
  const share = Math.min(1, Math.max(0, Math.log(rate / low) / Math.log(high / low)));
  return stops[Math.min(stops.length - 1, Math.floor(share * stops.length))];
}

function rateText(rate) { return (rate / 1e6).toPrecision(3) + " Mbit/s"; }

function phase(task, time) {
  const gone = get(task, "status") === DROPPED;
  if (get(task, "server") < 0) return !gone && get(task, "decided") <= time && time < get(task, "end") ? "local" : "";
  if (get(task, "upload_start") <= time && time < get(task, "upload_end")) return "sending";
  if (get(task, "upload_end") <= time && time < get(task, gone ? "finish" : "start")) return "waiting";
  if (!gone && get(task, "start") <= time && time < get(task, "end")) return "running";
  if (!gone && get(task, "end") <= time && time < get(task, "finish")) return "returning";
  return "";
}

function backlogs(time) {
  const left = servers.map(() => 0);
  for (const task of tasks) {
    const server = get(task, "server");
    if (server >= 0 && get(task, "status") !== DROPPED && get(task, "upload_end") <= time && time < get(task, "end"))
      left[server] = scene.shared ? Math.max(left[server], get(task, "end") - time)
        : left[server] + get(task, "end") - Math.max(get(task, "start"), time);
  }
  return scene.shared ? left : left.map((work, server) => work / servers[server].gpus);
}

function fit() {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth;
  const height = Math.round(width * Math.min(0.62, Math.max(0.4, scene.hall[1] / scene.hall[0] + 0.06)));
  canvas.style.height = height + "px";
  canvas.width = width * ratio; canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const margin = 26, scale = Math.min((width - 2 * margin) / scene.hall[0], (height - 2 * margin) / scene.hall[1]);
  const left = (width - scale * scene.hall[0]) / 2, top = (height - scale * scene.hall[1]) / 2;
  return { pen, width, height, at: (x, y) => [left + x * scale, top + (scene.hall[1] - y) * scale], scale };
}

function drawHall() {
  const { pen, width, height, at, scale } = fit();
  const counts = { sending: 0, waiting: 0, running: 0, returning: 0, local: 0 }, waits = servers.map(() => 0);
  const asking = new Set(), busy = new Set(), ink = colour("ink"), quiet = colour("quiet"), paper = colour("paper");
  places = [];
  pen.clearRect(0, 0, width, height);
  pen.lineWidth = 1; pen.strokeStyle = colour("line");
  const corner = at(0, scene.hall[1]);
  pen.strokeRect(corner[0], corner[1], scene.hall[0] * scale, scene.hall[1] * scale);
  tasks.forEach((task, index) => {
    const what = phase(task, now);
    if (!what) return;
    counts[what] += 1;
    if (what === "waiting") waits[get(task, "server")] += 1;
    if (what === "local") busy.add(get(task, "device"));
    if (what !== "sending" && what !== "returning") return;
    const from = at(...scene.devices[get(task, "device")]), to = at(servers[get(task, "server")].x, servers[get(task, "server")].y);
    pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to);
    if (what === "returning") {
      pen.setLineDash([2, 4]); pen.strokeStyle = quiet; pen.lineWidth = 1.5; pen.stroke(); pen.setLineDash([]);
      return;
    }
    asking.add(get(task, "device"));
    const span = Math.max(get(task, "upload_end") - get(task, "upload_start"), 1e-9);
    const share = (now - get(task, "upload_start")) / span;
    const dot = [from[0] + share * (to[0] - from[0]), from[1] + share * (to[1] - from[1])];
    pen.strokeStyle = ramp(get(task, "rate")); pen.lineWidth = index === chosen ? 5 : 2.5; pen.stroke();
    pen.beginPath(); pen.arc(...dot, 5, 0, 7); pen.fillStyle = pen.strokeStyle; pen.fill();
    places.push({ x: dot[0], y: dot[1], task: index });
  });
  scene.devices.forEach((place, device) => {
    const [x, y] = at(...place);
    pen.beginPath(); pen.arc(x, y, busy.has(device) || asking.has(device) ? 6 : 4.5, 0, 7);
    pen.fillStyle = busy.has(device) ? colour("local") : asking.has(device) ? colour("done") : colour("device");
    pen.fill();
    if (chosen >= 0 && get(tasks[chosen], "device") === device) { pen.strokeStyle = ink; pen.lineWidth = 2; pen.stroke(); }
    places.push({ x, y, device });
  });
  const left = backlogs(now), tall = Math.max(34, Math.min(56, height * 0.13));
  pen.font = "12px system-ui, sans-serif";
  servers.forEach((server, index) => {
    const [x, y] = at(server.x, server.y);
    pen.fillStyle = ink; pen.fillRect(x - 7, y - 7, 14, 14);
    pen.fillStyle = paper; pen.fillRect(x + 10, y - tall + 7, 9, tall);
    pen.fillStyle = colour("late");
    const high = tall * Math.min(1, left[index] / scene.full);
    pen.fillRect(x + 10, y + 7 - high, 9, high);
    pen.strokeStyle = quiet; pen.lineWidth = 1; pen.strokeRect(x + 10, y - tall + 7, 9, tall);
    label(pen, paper, ink, left[index].toFixed(scene.full < 10 ? 1 : 0) + " s", x + 23, y - tall + 17, "left");
    if (waits[index]) label(pen, paper, ink, waits[index] + " wait", x + 23, y - tall + 32, "left");
    pen.font = "bold 12px system-ui, sans-serif";
    label(pen, paper, ink, server.name, x, y + 21, "center");
    pen.font = "12px system-ui, sans-serif";
    places.push({ x, y, server: index, text: `${left[index].toFixed(1)} s ${LEFT_IS}, ${waits[index]} waiting` });
  });
  const words = `${counts.sending} sending, ${counts.waiting} waiting, ${counts.running} running, ` +
    `${counts.local} on devices, ${counts.returning} returning`;
  find("counts").textContent = words;
  canvas.setAttribute("aria-label", `Hall from above at ${now.toFixed(1)} seconds: ${words}. ` +
    servers.map((server, index) => `${server.name} ${left[index].toFixed(1)} s ${LEFT_IS}`).join(", ") + ".");
}

function label(pen, paper, ink, text, x, y, align) {
  pen.textAlign = align; pen.lineWidth = 4; pen.strokeStyle = paper; pen.lineJoin = "round";
  pen.strokeText(text, x, y); pen.fillStyle = ink; pen.fillText(text, x, y);
}

function element(name, values, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const LEFT = 96, ROW = 18, GAP = 10;
function drawChart() {
  const width = Math.max(320, chart.clientWidth), rows = servers.map((server) => server.laneHeight * ROW);
  const height = servers.reduce((sum, server, number) => sum + server.lanes * rows[number], 0) + servers.length * GAP + 34, span = scene.end - scene.start;
  const x = (time) => LEFT + (Math.min(Math.max(time, scene.start), scene.end) - scene.start) / span * (width - LEFT - 14);
  chart.replaceChildren(); rects = new Map();
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`); chart.style.height = height + "px";
  const pattern = element("pattern", { id: "loads", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  pattern.append(element("rect", { width: 6, height: 6, fill: "var(--load)" }), element("rect", { width: 2, height: 6, fill: "#444" }));
  const defs = element("defs", {}); defs.append(pattern); chart.append(defs);
  // Steps of 1, 2 or 5 times a power of ten, at least 70 pixels apart.
  const rough = span * 70 / (width - LEFT), power = 10 ** Math.floor(Math.log10(rough));
  const every = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  for (let number = Math.ceil(scene.start / every - 1e-9); number * every <= scene.end + 1e-9; number += 1) {
    const time = number * every;
    chart.append(element("line", { class: "grid", x1: x(time), x2: x(time), y1: 4, y2: height - 24 }),
      element("text", { class: "axis", x: x(time), y: height - 8, "text-anchor": "middle" },
        time.toFixed(Math.max(0, -Math.floor(Math.log10(every) + 1e-9)))));
  }
  chart.append(element("text", { class: "axis", x: LEFT - 26, y: height - 8, "text-anchor": "end" }, "time, s"));
  let top = 6;
  servers.forEach((server, number) => {
    const name = server.name.length > 13 ? server.name.slice(0, 12) + "\u2026" : server.name;
    chart.append(element("text", { x: LEFT - 8, y: top + server.lanes * rows[number] / 2 + 4, "text-anchor": "end" }, name));
    tasks.forEach((task, index) => {
      if (get(task, "server") !== number) return;
      const gone = get(task, "status") === DROPPED, begin = get(task, gone ? "finish" : "start"), end = get(task, gone ? "finish" : "end");
      if (end < scene.start || begin > scene.end) return;
      const group = element("g", { class: "task", "data-task": index });
      const row = rows[number], y = top + get(task, "lane") * row, late = get(task, "status") === "late";
      if (gone) {
        group.append(element("text", { x: x(begin) - 4, y: y + row / 2 + 5, "font-weight": "bold" }, "\u00d7"));
      } else {
        const wide = Math.max(1.5, x(end) - x(begin) - 0.8);
        const bar = element("rect", { x: x(begin), y: y + row * (late ? 0.22 : 0.06), width: wide, height: row * (late ? 0.56 : 0.88),
          fill: late ? "var(--late)" : "var(--done)" });
        group.append(bar); rects.set(index, bar);
        if (get(task, "switch") > 0)
          group.append(element("rect", { x: x(begin), y: y + row * 0.06, height: row * 0.88, fill: "url(#loads)",
            width: Math.max(0, x(begin + get(task, "switch")) - x(begin)), "pointer-events": "none" }));
      }
      chart.append(group);
    });
    top += server.lanes * rows[number] + GAP;
  });
  chart.append(element("line", { id: "cursor", y1: 2, y2: height - 22, stroke: "var(--ink)", "stroke-width": 2, "pointer-events": "none" }));
  chart.timeAt = (px) => scene.start + (px - LEFT) / (width - LEFT - 14) * span;
  chart.xAt = x;
  mark();
}

function mark() {
  for (const [index, bar] of rects) bar.classList.toggle("chosen", index === chosen);
}

function draw() {
  slider.value = now;
  slider.setAttribute("aria-valuetext", now.toFixed(1) + " seconds");
  find("clock").textContent = now.toFixed(1) + " s";
  const cursor = find("cursor");
  if (cursor) { cursor.setAttribute("x1", chart.xAt(now)); cursor.setAttribute("x2", chart.xAt(now)); }
  drawHall();
}

function seek(time) { now = Math.min(scene.end, Math.max(scene.start, time)); draw(); }

function facts(title, pairs) {
  const list = document.createElement("dl");
  for (const [name, value] of pairs) {
    const term = document.createElement("dt"), words = document.createElement("dd");
    term.textContent = name; words.textContent = value; list.append(term, words);
  }
  find("what").textContent = title;
  find("facts").replaceChildren(list);
}

function show(index, pin) {
  if (pin) { chosen = index; mark(); }
  const task = tasks[index], s = (value) => value.toFixed(2) + " s", server = get(task, "server");
  const pairs = [["from", `device ${get(task, "device")}`],
    ["runs on", server < 0 ? "the device itself" : servers[server].name + (scene.shared ? "" : `, GPU ${get(task, "lane")}`)]];
  if (get(task, "model") >= 0) pairs.push(["model", scene.models[get(task, "model")]]);
  pairs.push(["generated", s(get(task, "generated"))], ["decided", s(get(task, "decided"))]);
  if (server >= 0) {
    pairs.push(["upload", `${s(get(task, "upload_end") - get(task, "decided"))}, ${rateText(get(task, "rate"))}`]);
    pairs.push(["size", (get(task, "size") / 8e6).toPrecision(3) + " MB"]);
  }
  if (get(task, "status") !== DROPPED) {
    pairs.push(["waits", s(Math.max(0, get(task, "start") - (server < 0 ? get(task, "decided") : get(task, "upload_end"))))]);
    if (get(task, "switch") > 0) pairs.push(["loads model", s(get(task, "switch"))]);
    pairs.push(["runs", s(get(task, "end") - get(task, "start") - get(task, "switch"))]);
    if (server >= 0) pairs.push(["download", s(Math.max(0, get(task, "finish") - get(task, "end")))]);
  }
  pairs.push(["latency", s(get(task, "finish") - get(task, "generated"))], ["deadline", s(get(task, "deadline"))],
    ["status", get(task, "status")]);
  facts(`Task ${index + 1} of ${tasks.length}`, pairs);
}

function step(by) {
  const index = chosen < 0 ? tasks.findIndex((task) => get(task, "finish") >= now) : chosen + by;
  const next = Math.min(tasks.length - 1, Math.max(0, index));
  stop(); show(next, true);
  if (now < get(tasks[next], "decided") || now > get(tasks[next], "finish")) now = Math.max(scene.start, get(tasks[next], "decided"));
  seek(now);
}

function stop() { playing = false; play.textContent = "Play"; }

function start() {
  if (now >= scene.end) now = scene.start;
  playing = true; last = 0; carried = 0; play.textContent = "Pause";
  requestAnimationFrame(tick);
}

function tick(stamp) {
  if (!playing) return;
  if (last) carried += (stamp - last) / 1000 * Number(speed.value);
  last = stamp;
  // Whoever asked for less motion sees one slot after the other, without anything that glides.
  const jump = calm.matches ? Math.floor(carried / scene.slot) * scene.slot : carried;
  if (jump > 0) { carried -= jump; seek(now + jump); }
  if (now >= scene.end) stop();
  requestAnimationFrame(tick);
}

function paint(theme) {
  root.dataset.theme = theme;
  find("theme").textContent = theme === "dark" ? "Light" : "Dark";
  find("ramp").style.background = `linear-gradient(to right, ${scene.ramp[theme].join(", ")})`;
  draw();
}

play.addEventListener("click", () => (playing ? stop() : start()));
slider.addEventListener("input", () => { stop(); seek(Number(slider.value)); });
find("theme").addEventListener("click", () => paint(root.dataset.theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const tag = event.target.tagName, slot = scene.slot * (event.shiftKey ? 10 : 1);
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    if (tag === "SELECT") return;
    event.preventDefault(); step(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === " ") {
    if (tag === "BUTTON" || tag === "SELECT") return;
    event.preventDefault(); playing ? stop() : start();
  } else if (tag !== "SELECT" && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) {
    event.preventDefault(); stop();
    seek({ ArrowLeft: now - slot, ArrowRight: now + slot, Home: scene.start, End: scene.end }[event.key]);
  } else if (event.key === "Escape") { chosen = -1; mark(); draw(); }
});
chart.addEventListener("pointermove", (event) => {
  const group = event.target.closest("[data-task]");
  if (group) show(Number(group.dataset.task), false);
});
chart.addEventListener("click", (event) => {
  const group = event.target.closest("[data-task]"), box = chart.getBoundingClientRect();
  stop();
  if (group) show(Number(group.dataset.task), true);
  seek(chart.timeAt(event.clientX - box.left));
});
canvas.addEventListener("pointermove", (event) => {
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = null, near = 14;
  for (const place of places) {
    const apart = Math.hypot(place.x - x, place.y - y);
    if (apart < near) { best = place; near = apart; }
  }
  if (!best) return;
  if (best.task !== undefined) return show(best.task, false);
  if (best.server !== undefined) {
    const server = servers[best.server];
    return facts(server.name, [["GPUs", server.gpus], ["speed of each", server.speed], ["now", best.text]]);
  }
  const own = tasks.map((task, index) => [task, index]).filter(([task]) => get(task, "device") === best.device);
  facts(`Device ${best.device}`, [["tasks here", own.length],
    ["now", own.filter(([task]) => phase(task, now)).map(([task, index]) => `task ${index + 1} ${phase(task, now)}`).join(", ") || "idle"]]);
});
addEventListener("resize", () => { drawChart(); draw(); });

const given = new URLSearchParams(location.hash.slice(1));
drawChart();
paint(given.get("theme") || (dark.matches ? "dark" : "light"));
if (given.has("t")) { seek(Number(given.get("t")) || scene.start); }
if (given.has("task")) { show(Math.min(tasks.length - 1, Math.max(0, Number(given.get("task")) - 1 || 0)), true); draw(); }
if (!calm.matches && !given.has("t")) start();
