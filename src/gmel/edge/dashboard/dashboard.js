// The page of a gateway. It reads what every client may read (/v1/state, /v1/tasks, /v1/events) and changes nothing
// there. Whatever comes from the network is put in as text, never as markup.

const STATE_EVERY_MS = 1000;
const TASKS_EVERY_MS = 2000;
const GALLERY_EVERY_MS = 3000;
const PATIENCE_MS = 8000; // of one request
const MOST_PHOTOS = 12;
const MOST_DEVICES = 40; // on the map
const MOST_SERVERS = 200; // in the table
const MOST_FLASHES = 30;
const MOST_CELLS = 10; // of a queue on the map

const KEY = "gmel-key";
const SCORES = {
  "earliest-finish": "minus the seconds until the task is expected to end there",
  "least-connections": "minus the number of tasks there, ties drawn",
  "power-of-two": "minus the number of tasks there, of two servers drawn",
  "round-robin": "1 for the server whose turn it is",
};
const FINAL = new Set(["done", "failed", "expired", "cancelled"]);

const $ = (id) => document.getElementById(id);
const SVG = $("hall").namespaceURI;

// ---------------------------------------------------------------- text and nodes

function set(node, text) {
  const said = String(text ?? "");
  if (node.textContent !== said) node.textContent = said; // untouched text keeps selections and quiets screen readers
}

function make(tag, className = "", text = null) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== null) node.textContent = text;
  return node;
}

function draw(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

// Rows by key: those that stay keep their node, and with it the focus. A row that has the focus is not taken away.
const rowsOf = new WeakMap();

function sync(parent, items, keyOf, makeRow, fillRow) {
  const rows = rowsOf.get(parent) ?? new Map();
  rowsOf.set(parent, rows);
  const wanted = new Set(items.map(keyOf));
  for (const [key, row] of rows) {
    if (!wanted.has(key) && !row.contains(document.activeElement)) {
      row.remove();
      rows.delete(key);
    }
  }
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let row = rows.get(key);
    if (!row) rows.set(key, (row = makeRow(item)));
    fillRow(row, item);
    if (row === next) next = next.nextElementSibling;
    else parent.insertBefore(row, next);
  }
}

const still = (list) => list.matches(":hover"); // a list does not run away under the pointer

function cells(row, values) {
  values.forEach((value, place) => {
    const cell = row.children[place];
    if (Array.isArray(value)) {
      set(cell, value[0]);
      cell.className = value[1];
    } else set(cell, value);
  });
}

function tableRow(classes) {
  const row = make("tr");
  classes.forEach((className, place) => {
    const cell = make(place ? "td" : "th", className);
    if (!place) cell.scope = "row";
    row.append(cell);
  });
  return row;
}

function taskButton(id) {
  const button = make("button", "link", id);
  button.type = "button";
  button.setAttribute("aria-label", `Show task ${id}`);
  button.addEventListener("click", () => choose(id, button));
  return button;
}

const GAP = "\u00a0"; // a number stays in one line with its unit

function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size >= 6000) return `${Math.round(value / 3600)}${GAP}h`;
  if (size >= 600) return `${Math.round(value / 60)}${GAP}min`;
  if (size >= 100) return `${Math.round(value)}${GAP}s`;
  if (size >= 10) return `${value.toFixed(1)}${GAP}s`;
  if (size >= 0.1) return `${value.toFixed(2)}${GAP}s`;
  return `${Math.round(value * 1000)}${GAP}ms`;
}

function lasting(value) {
  const whole = Math.floor(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

// Of an axis: without noughts at the end.
function tick(value) {
  const said = seconds(value);
  return said.includes(".") ? said.replace(/\.?0+(?=\u00a0s$)/, "") : said;
}

const count = (value, one, many = `${one}s`) => `${value} ${value === 1 ? one : many}`;
const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.1 ? 1 : 0)}${GAP}%`.replace(".0", "");
const clock = (at_s) => new Date(at_s * 1000).toLocaleTimeString([], { hour12: false });
const shortened = (text, letters) => (text.length <= letters ? text : `${text.slice(0, Math.max(letters - 1, 1))}…`);
// Of names that differ by their number at the end, that end stays.
const squeezed = (text, letters) => (text.length <= letters ? text : `${text.slice(0, Math.max(letters - 5, 1))}…${text.slice(-3)}`);

// ---------------------------------------------------------------- the gateway

let key = sessionStorage.getItem(KEY);
let paused = false;
let locked = false;
let plant = null;
let latest = null; // the last state
let heard = 0; // when it came
let streaming = false;

class LockedError extends Error {} // a key is needed
class GoneError extends Error {} // no answer, or none that can be used

async function ask(path, options = {}) {
  const shown = key;
  const headers = shown ? { Authorization: `Bearer ${shown}` } : {};
  let answer;
  try {
    answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS), ...options });
  } catch (error) {
    throw new GoneError(path, { cause: error });
  }
  if (answer.status === 401 || answer.status === 403) {
    if (shown === key) lock(answer.status); // not where another key was given meanwhile
    throw new LockedError();
  }
  if (!answer.ok) throw new GoneError(`${path}: ${answer.status}`);
  return answer;
}

async function read(path) {
  const answer = await ask(path);
  try {
    return await answer.json();
  } catch (error) {
    throw new GoneError(path, { cause: error });
  }
}

function lock(status) {
  if (locked) return;
  locked = true;
  set($("key-error"), !key ? "" : status === 403 ? "This is not the key of an operator." : "This key is not known here.");
  key = null;
  sessionStorage.removeItem(KEY);
  $("locked").hidden = false;
  $("board").hidden = true;
  $("forget").hidden = true;
  connection("waiting", "waiting for a key");
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  set($("key-error"), "");
  sessionStorage.setItem(KEY, key);
  locked = false;
  $("locked").hidden = true;
  run();
});

$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  set($("pause"), paused ? "Go on" : "Pause updates");
  if (paused) connection("paused", "paused");
  else run();
});

function connection(state, text) {
  $("connection").dataset.state = state;
  set($("connection"), text);
}

const announced = { at: 0, regular: 0 };

// For screen readers: what matters at once, a summary once a minute, nothing else.
function announce(text) {
  const now = Date.now();
  const before = now - announced.at < 4000 ? `${$("summary").textContent} ` : "";
  announced.at = now;
  set($("summary"), (before + text).slice(-300));
}

function every(interval, work) {
  let busy = false;
  const tick = async () => {
    if (busy || paused || locked || document.hidden) return;
    busy = true;
    try {
      await work();
    } catch (error) {
      // Of the other requests nothing is said: the state tells whether the gateway is there.
      if (error instanceof GoneError) {
        if (work === readState) lost();
      } else if (!(error instanceof LockedError)) console.error(error);
    } finally {
      busy = false;
    }
  };
  setInterval(tick, interval);
  return tick;
}

function lost() {
  const gone = heard ? `, last heard ${lasting((Date.now() - heard) / 1000)} ago` : "";
  if ($("connection").dataset.state === "live") announce("The gateway does not answer.");
  connection("lost", `gateway does not answer${gone}`);
}

async function readState() {
  plant ??= await read("/v1/plant");
  const state = await read("/v1/state");
  if ($("connection").dataset.state === "lost") announce("The gateway answers again.");
  heard = Date.now();
  connection("live", streaming ? "live" : "live, once a second");
  $("board").hidden = false;
  $("forget").hidden = !key;
  show(state);
}

async function readTasks() {
  if (still($("tasks"))) return;
  const state = $("state").value;
  showTasks((await read(`/v1/tasks?limit=15${state ? `&state=${state}` : ""}`)).tasks);
}

// Events by fetch, because an EventSource cannot send a key.
async function follow() {
  let wait_ms = 1000;
  for (;;) {
    try {
      if (!paused && !locked && !document.hidden) {
        const answer = await ask("/v1/events", { signal: undefined });
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        streaming = true;
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          wait_ms = 1000;
          const lines = (rest + value).split("\n");
          rest = lines.pop();
          for (const line of lines) if (line.startsWith("data: ") && !paused) happened(JSON.parse(line.slice(6)));
          if (paused || locked) {
            await reader.cancel();
            break;
          }
        }
      }
    } catch {
      wait_ms = Math.min(wait_ms * 2, 15000);
    }
    streaming = false;
    await new Promise((resume) => setTimeout(resume, wait_ms));
  }
}

function happened(event) {
  if (event.event === "decided") flash(event.device, event.server);
  else if (event.event === "server") {
    const what = event.alive ? "is ready" : event.draining ? "drains and takes no more" : "is not heard any more";
    announce(`Server ${event.server} ${what}.`);
  } else if (event.event === "policy" && !event.shadow) announce(`Policy ${event.name} is in charge.`);
  else if (event.event === "failed") announce(`Task ${event.id} has failed.`);
}

// ---------------------------------------------------------------- the state

function stateOf(server) {
  if (server.draining) return ["draining", "draining"];
  if (server.alive) return server.usable ? ["ready", "ready"] : ["resting", "left alone"];
  return ["gone", server.heard_s === null ? "never heard" : `not heard for ${lasting(server.heard_s)}`];
}

function show(state) {
  latest = state;
  const { counts, latency, policy } = state;
  set($("plant"), state.plant);
  document.title = `${state.open} open · ${state.plant} · GMEL gateway`;
  set($("policy"), `${policy.current.name}, number ${policy.current.version}`);
  $("shadow").hidden = !policy.shadow;
  if (policy.shadow) {
    const { name, seen, agreed } = policy.shadow;
    set($("shadow"), `shadow ${name}: agrees in ${seen ? percent(agreed / seen) : "-"} of ${seen}`);
  }
  set($("up"), lasting(state.up_s));
  set($("version"), state.gmel);
  $("fallback-notice").hidden = !policy.fallbacks;
  set(
    $("fallback-notice"),
    `The plain rule decided ${count(policy.fallbacks, "time")} in place of the policy. Last reason: ${policy.reasons.at(-1) ?? "-"}`,
  );
  set($("open"), state.open);
  set($("open-more"), state.parked ? `${state.parked} that no server can take` : "all placed");
  set($("done"), counts.done ?? 0);
  const bad = (counts.failed ?? 0) + (counts.expired ?? 0);
  set($("done-more"), bad ? `${bad} failed or expired` : "none failed");
  set($("in-time"), latency.in_time === null ? "-" : percent(latency.in_time));
  set($("in-time-more"), `of the last ${count(latency.tasks, "task")}`);
  for (const name of ["p50", "p95", "p99"]) set($(name), seconds(latency[`${name}_s`]));
  if (Date.now() - announced.regular > 60000) {
    announced.regular = Date.now();
    const alive = state.servers.filter((server) => server.alive).length;
    announce(`${alive} of ${count(state.servers.length, "server")} alive, ${count(state.open, "task")} open, ${$("in-time").textContent} in time.`);
  }
  showServers(state.servers);
  showHall();
  showDecisions(state);
  showIncidents(state);
  showCharts();
}

function showServers(servers) {
  const classes = ["", "state", "number", "number", "number", "number", "number", "wide"];
  sync(
    $("servers").tBodies[0],
    servers.slice(0, MOST_SERVERS),
    (server) => server.name,
    () => tableRow(classes),
    (row, server) => {
      const [kind, text] = stateOf(server);
      cells(row, [
        server.name,
        [text, `state ${kind}`],
        `${server.tasks - server.waiting} + ${server.waiting}`,
        kind !== "ready" ? "-" : server.backlog_s ? seconds(server.backlog_s) : "now",
        server.pace.toFixed(2),
        server.done,
        [server.lost, server.lost ? "number late-mark" : "number"],
        server.resident.join(", ") || "none",
      ]);
    },
  );
  if (servers.length > MOST_SERVERS) set($("servers-note"), `The first ${MOST_SERVERS} of ${servers.length} servers.`);
}

function showScores(list, scores, chosen) {
  const entries = Object.entries(scores ?? {}).sort((one, other) => other[1] - one[1]);
  const values = entries.map(([, score]) => score);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  sync(
    list,
    entries,
    ([name]) => name,
    () => {
      const row = make("li");
      const bar = draw("svg", { "aria-hidden": "true" });
      bar.append(draw("rect", { class: "track", width: "100%", height: 9, rx: 3 }), draw("rect", { class: "fill", height: 9, rx: 3 }));
      row.append(make("span"), bar, make("span", "score"));
      return row;
    },
    (row, [name, score]) => {
      const share = high > low ? 0.06 + (0.94 * (score - low)) / (high - low) : 1;
      row.className = name === chosen ? "chosen" : "";
      set(row.children[0], name);
      row.children[1].lastChild.setAttribute("width", `${(100 * share).toFixed(1)}%`);
      const said = Math.abs(score) >= 100 ? score.toFixed(0) : score.toFixed(3);
      set(row.children[2], name === chosen ? `${said} chosen` : said);
    },
  );
}

function showDecisions(state) {
  const current = state.policy.current.name;
  set(
    $("scores-text"),
    `The option with the largest score is chosen. Scores of ${current}: ${SCORES[current] ?? "logits of the learned actor"}.`,
  );
  if (still($("decisions"))) return;
  sync(
    $("decisions"),
    state.decisions.slice(0, 12),
    (decision) => `${decision.id} ${decision.at_s}`,
    (decision) => {
      const row = make("li");
      const line = make("div", "line");
      const what = make("span");
      const to = `: ${decision.device} to `;
      what.append(taskButton(decision.id), to, make("b", "", decision.server));
      const more = decision.options > Object.keys(decision.scores).length ? `, best of ${decision.options} options` : "";
      line.append(what, make("span", "when", `${clock(decision.at_s)} by ${decision.policy}, expected ${seconds(decision.expected_s)}${more}`));
      const scores = make("ul", "scores");
      scores.setAttribute("aria-label", `Scores for task ${decision.id} by ${decision.policy}`);
      row.append(line, scores);
      showScores(scores, decision.scores, decision.server);
      if (decision.fallback) row.append(make("p", "why", `The plain rule decided: ${decision.fallback}`));
      return row;
    },
    () => {},
  );
}

function incidentText(event) {
  const tasks = event.times > 1 ? `${event.times} tasks` : `task ${event.id}`;
  const at = event.server ? ` at ${event.server}` : "";
  const why = event.error ? `: ${event.error.replace(`${event.server}: `, "")}` : "";
  switch (event.event) {
    case "retried":
      return ["retried", "sent again", `${tasks}${at}${why}`];
    case "failed":
      return ["failed", "failed", `${tasks}${at}${why}`];
    case "expired":
      return ["expired", "expired", `${tasks}: the deadline had passed`];
    case "cancelled":
      return ["cancelled", "cancelled", tasks];
    case "server":
      if (event.alive) return ["ready", "server ready", `${event.server} is heard and takes tasks`];
      if (event.draining) return ["draining", "server drains", `${event.server} takes no more tasks`];
      return ["gone", "server lost", `${event.server} is not heard any more`];
    default:
      if (!event.shadow) return ["accepted", "policy", `${event.name} is in charge`];
      return ["accepted", "policy", event.name ? `${event.name} decides in the shadow` : "nobody decides in the shadow"];
  }
}

function showIncidents(state) {
  const { counts, turned_away: away } = state;
  const refused = Object.values(away).reduce((sum, each) => sum + each, 0);
  const lostTasks = state.servers.reduce((sum, server) => sum + server.lost, 0);
  const said = [
    count(lostTasks, "attempt was lost with its server", "attempts were lost with their server"),
    `${counts.failed ?? 0} failed`,
    `${counts.expired ?? 0} expired`,
    `${counts.cancelled ?? 0} cancelled`,
    `${refused} turned away`,
  ];
  set($("incidents-text"), `${said.join(", ")}. An attempt that is lost is made again elsewhere: no accepted task is.`);
  if (still($("incidents"))) return;
  const list = $("incidents");
  sync(
    list,
    state.incidents.length ? state.incidents : [{ at_s: 0 }],
    (event) => `${event.event} ${event.at_s} ${event.id} ${event.server}`,
    (event) => {
      const row = make("li");
      if (!event.event) {
        row.append(make("span"), make("span"), make("span", "", "Nothing went wrong since the gateway started."));
        return row;
      }
      const [kind, name, text] = incidentText(event);
      const time = make("time", "", clock(event.at_s));
      time.dateTime = new Date(event.at_s * 1000).toISOString();
      row.append(time, make("span", `state ${kind}`, name), make("span", "", text));
      return row;
    },
    () => {},
  );
}

// ---------------------------------------------------------------- the hall

const hall = { base: draw("g"), servers: draw("g"), flashes: draw("g"), at: new Map(), from: new Map() };
$("hall").append(hall.base, hall.flashes, hall.servers);

function showHall() {
  const width = Math.max($("hall").clientWidth, 280);
  const [hallW, hallH] = plant.hall_m;
  const [side, top] = [14, 44];
  const inner = width - 2 * side;
  const height = Math.round(Math.min(Math.max((inner * hallH) / hallW, 200), 460));
  $("hall").setAttribute("viewBox", `0 0 ${width} ${height + 2 * top}`);
  $("hall").setAttribute("height", height + 2 * top);
  const onMap = ([x, y]) => [side + (x / hallW) * inner, top + (y / hallH) * height];

  const servers = latest.servers.slice(0, MOST_SERVERS);
  hall.at.clear();
  const unplaced = servers.filter((server) => !server.position_m);
  for (const server of servers) {
    // Servers that the plant does not describe stand in a row along the lower wall.
    const place = unplaced.indexOf(server);
    const position = server.position_m ?? [((place + 0.5) / unplaced.length) * hallW, hallH * 0.85];
    hall.at.set(server.name, onMap(position));
  }
  const devices = showDevices({ width, height, side, top, inner, onMap });
  hall.servers.replaceChildren(...serverSigns(servers, width));
  const told = servers.slice(0, 20).map((server) => `${server.name} ${stateOf(server)[0]}, ${count(server.tasks, "task")}`);
  set($("hall-text"), `${count(servers.length, "server")}: ${told.join("; ")}. ${count(devices, "device")} heard lately.`);
}

function showDevices({ width, height, side, top, inner, onMap }) {
  const devices = latest.devices.slice(0, MOST_DEVICES).sort((one, other) => one.name.localeCompare(other.name, [], { numeric: true }));
  const half = Math.ceil(devices.length / 2);
  const room = inner / Math.max(half, 1);
  hall.from.clear();
  const nodes = [draw("rect", { class: "floor", x: side, y: top, width: inner, height, rx: 8 })];
  const signs = [];
  devices.forEach((device, place) => {
    const upper = place < half;
    const inRow = upper ? half : devices.length - half;
    const known = plant.device_positions_m?.[Number(/(\d+)$/.exec(device.name)?.[1] ?? NaN)];
    const [x, y] = known ? onMap(known) : [side + (((upper ? place : place - half) + 0.5) / inRow) * inner, upper ? top - 10 : top + height + 10];
    hall.from.set(device.name, [x, y]);
    const to = hall.at.get(device.server);
    if (to) nodes.push(draw("line", { class: "way", x1: x, y1: y, x2: to[0], y2: to[1] }));
    const sign = draw("g", { class: "device" });
    sign.append(draw("title", {}, `${device.name}, heard ${lasting(device.seen_s)} ago`), draw("circle", { cx: x, cy: y, r: 4.5 }));
    if (!known && room >= 44) {
      const letters = Math.floor(room / 6.8);
      sign.append(draw("text", { class: "soft middle tiny", x, y: upper ? y - 10 : y + 19 }, squeezed(device.name, letters)));
    }
    signs.push(sign);
  });
  if (!devices.length) signs.push(draw("text", { class: "soft middle", x: width / 2, y: top - 10 }, "no device was heard yet"));
  const more = latest.devices.length - devices.length;
  if (more > 0) signs.push(draw("text", { class: "soft end", x: width - side, y: 12 }, `and ${more} more devices`));
  hall.base.replaceChildren(...nodes, ...signs);
  return latest.devices.length;
}

function serverSigns(servers, width) {
  const places = servers.map((server) => hall.at.get(server.name));
  let nearest = 220;
  places.forEach(([x, y], one) => {
    places.forEach(([u, v], other) => {
      if (other > one) nearest = Math.min(nearest, Math.max(Math.abs(x - u), 2.1 * Math.abs(y - v)));
    });
  });
  const size = Math.min(Math.max(nearest * 0.88, 20), 164);
  return servers.map((server, place) => {
    const [kind, text] = stateOf(server);
    const small = size < 60;
    const height = small ? Math.min(size, 24) : 74;
    const x = Math.min(Math.max(places[place][0] - size / 2, 3), width - size - 3);
    const y = places[place][1] - height / 2;
    const sign = draw("g", { class: `server ${kind}` });
    sign.append(draw("title", {}, `${server.name}: ${text}, ${count(server.tasks, "task")}`));
    sign.append(draw("rect", { class: "body", x, y, width: size, height, rx: 8 }));
    if (kind === "gone" && !small) sign.append(draw("rect", { class: "ring", x: x + 4, y: y + 4, width: size - 8, height: height - 8, rx: 5 }));
    const pad = small ? 3 : 12;
    if (!small) {
      const letters = Math.floor((size - 2 * pad) / 7.4);
      const long = size > 130;
      const tasks = count(server.tasks, "task");
      sign.append(draw("text", { class: "name", x: x + pad, y: y + 23 }, shortened(server.name, long ? letters - 8 : letters)));
      if (long) sign.append(draw("text", { class: "soft end", x: x + size - pad, y: y + 23 }, tasks));
      const short = { gone: "not heard", resting: "left alone" }[kind] ?? text;
      sign.append(draw("text", { class: "soft state", x: x + pad, y: y + 41 }, shortened(short, Math.floor((size - 2 * pad) / 6.4))));
    }
    sign.append(...queueCells(server, x + pad, small ? y + height / 2 - 3 : y + 52, size - 2 * pad, small ? 6 : 10));
    return sign;
  });
}

// One cell a task; where there are more, a cell stands for several.
function queueCells(server, x, y, width, height) {
  const step = width / MOST_CELLS;
  const each = Math.max(server.tasks / MOST_CELLS, 1);
  const here = server.tasks - server.waiting;
  return Array.from({ length: MOST_CELLS }, (_, place) => {
    const filled = place * each < server.tasks;
    const kind = filled ? `cell ${place * each < here ? "at" : "waiting"}` : "slot";
    return draw("rect", { class: kind, x: x + place * step, y, width: Math.max(step - 2, 1), height, rx: 2 });
  });
}

function flash(device, server) {
  const [from, to] = [hall.from.get(device), hall.at.get(server)];
  if (!from || !to || document.hidden || hall.flashes.childElementCount >= MOST_FLASHES) return;
  const line = draw("line", { class: "flash", x1: from[0], y1: from[1], x2: to[0], y2: to[1] });
  setTimeout(() => line.remove(), 900);
  hall.flashes.append(line);
}

// ---------------------------------------------------------------- charts

function canvas(id, height) {
  const svg = $(id);
  const width = Math.max(svg.clientWidth, 280);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const layer = (svg.layer ??= svg.appendChild(draw("g")));
  return { width, layer };
}

function steps(most) {
  const raw = Math.max(most, 1e-3) / 3;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
}

function showCharts() {
  showTimeline();
  showHistogram();
}

function showTimeline() {
  const { rows, every_s: every, count: number } = latest.intervals;
  const { width, layer } = canvas("timeline", 250);
  const [left, right, top, bottom, floor] = [52, 14, 20, 150, 214];
  const step = (width - left - right) / number;
  const x = (ago) => left + (number - 1 - ago + 0.5) * step;
  const unit = steps(Math.max(...rows.map((row) => row.p95_s), 0));
  const ceiling = Math.max(Math.ceil(Math.max(...rows.map((row) => row.p95_s), 0) / unit), 1) * unit;
  const y = (value) => bottom - (value / ceiling) * (bottom - top);
  const nodes = [];
  for (let value = 0; value <= ceiling + unit / 2; value += unit) {
    nodes.push(draw("line", { class: value ? "grid" : "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    nodes.push(draw("text", { class: "soft end", x: left - 6, y: y(value) + 4 }, value ? tick(value) : "0"));
  }
  const most = Math.max(...rows.map((row) => row.tasks), 1);
  const tall = floor - bottom - 16;
  for (const row of rows) {
    const place = { x: x(row.ago) - step / 2 + 0.5, width: Math.max(step - 1, 1) };
    const whole = (row.tasks / most) * tall;
    const late = (row.late / most) * tall;
    nodes.push(draw("rect", { class: "bar", ...place, y: floor - whole, height: whole - late }));
    if (late) nodes.push(draw("rect", { class: "bar late", ...place, y: floor - late, height: late }));
  }
  nodes.push(draw("line", { class: "axis", x1: left, x2: width - right, y1: floor, y2: floor }));
  nodes.push(draw("text", { class: "soft end", x: left - 6, y: floor - tall + 9 }, most));
  nodes.push(draw("text", { class: "soft end", x: left - 6, y: floor }, "tasks"));
  for (const minutes of [10, 5, 0]) {
    const at = Math.min(Math.max(x((minutes * 60) / every), left), width - right);
    const anchor = minutes === 10 ? "" : minutes ? "middle" : "end";
    nodes.push(draw("text", { class: `soft ${anchor}`, x: at, y: floor + 18 }, minutes ? `${minutes} min ago` : "now"));
  }
  for (const name of ["p50", "p95"]) nodes.push(...brokenLine(rows, name, x, y));
  layer.replaceChildren(...nodes);
  const tasks = rows.reduce((sum, row) => sum + row.tasks, 0);
  const late = rows.reduce((sum, row) => sum + row.late, 0);
  const last = rows.at(-1);
  set(
    $("timeline-text"),
    tasks
      ? `${count(tasks, "task")} done in ten minutes, ${late} late. In the last ${every} s with a result: P50 ${seconds(last.p50_s)}, P95 ${seconds(last.p95_s)}.`
      : "No task was done in the last ten minutes.",
  );
}

// A line that does not cross intervals without a result: nothing is known of them.
function brokenLine(rows, name, x, y) {
  const nodes = [];
  let run = [];
  const end = () => {
    if (run.length === 1) nodes.push(draw("circle", { class: name, cx: run[0][0], cy: run[0][1], r: 3 }));
    else if (run.length) nodes.push(draw("polyline", { class: name, points: run.map((point) => point.join(",")).join(" ") }));
    run = [];
  };
  rows.forEach((row, place) => {
    if (place && rows[place - 1].ago !== row.ago + 1) end();
    run.push([x(row.ago), y(row[`${name}_s`])]);
  });
  end();
  return nodes;
}

function showHistogram() {
  const { shares, share_ends: ends } = latest.intervals;
  const { width, layer } = canvas("histogram", 250);
  const [left, right, top, floor] = [40, 14, 34, 206];
  const most = Math.max(...shares, 1);
  const step = (width - left - right) / shares.length;
  const limit = ends.indexOf(1) + 1; // bars from here on are late
  const nodes = [];
  const unit = Math.max(Math.round(steps(most)), 1);
  for (let value = 0; value <= most; value += unit) {
    const y = floor - (value / most) * (floor - top);
    nodes.push(draw("line", { class: value ? "grid" : "axis", x1: left, x2: width - right, y1: y, y2: y }));
    nodes.push(draw("text", { class: "soft end", x: left - 6, y: y + 4 }, value));
  }
  shares.forEach((tasks, place) => {
    const tall = (tasks / most) * (floor - top);
    const bar = { x: left + place * step + 1.5, width: Math.max(step - 3, 1), y: floor - tall, height: tall };
    nodes.push(draw("rect", { class: place < limit ? "bar solid" : "bar late", ...bar }));
  });
  const line = left + limit * step;
  nodes.push(draw("line", { class: "limit", x1: line, x2: line, y1: 14, y2: floor }));
  nodes.push(draw("text", { class: "soft end", x: line - 6, y: 20 }, "in time"));
  nodes.push(draw("text", { class: "soft", x: line + 6, y: 20 }, "late"));
  const marks = [[0, "0"], [5, "50 %"], [10, "100 %"], [12, "200 %"]];
  marks.slice(0, width < 420 ? 3 : 4).forEach(([place, text]) => {
    nodes.push(draw("text", { class: "soft middle", x: left + place * step, y: floor + 18 }, text));
  });
  layer.replaceChildren(...nodes);
  const tasks = shares.reduce((sum, each) => sum + each, 0);
  const late = shares.slice(limit).reduce((sum, each) => sum + each, 0);
  const quick = shares.slice(0, 5).reduce((sum, each) => sum + each, 0);
  set(
    $("histogram-text"),
    tasks
      ? `${percent(quick / tasks)} of the tasks took up to half of their deadline, ${percent(late / tasks)} came after it.`
      : "No task was done in the last ten minutes.",
  );
}

// ---------------------------------------------------------------- tasks, one task, photos

function showTasks(tasks) {
  const classes = ["", "state", "", "", "", "number", "number", "number", "wide"];
  sync(
    $("tasks").tBodies[0],
    tasks,
    (task) => task.id,
    (task) => {
      const row = tableRow(classes);
      row.firstElementChild.append(taskButton(task.id));
      return row;
    },
    (row, task) => {
      const { request, record } = task;
      const late = record && record.latency_s > request.deadline_s;
      const filled = [
        [task.state === "leased" ? `leased, ${percent(task.progress ?? 0)}` : task.state, `state ${task.state}`],
        request.device,
        `${request.images} × ${request.model}${request.label ? ` ${request.label}` : ""}`,
        task.server ?? "-",
        task.attempt,
        [record ? seconds(record.latency_s) : "-", late ? "number late-mark" : "number"],
        seconds(request.deadline_s),
        task.error ?? (late ? "late" : ""),
      ];
      filled.forEach((value, place) => {
        const cell = row.children[place + 1];
        set(cell, Array.isArray(value) ? value[0] : value);
        if (Array.isArray(value)) cell.className = value[1];
      });
    },
  );
  set($("tasks-caption"), tasks.length ? `The newest ${count(tasks.length, "task")}` : "No such task");
}

const chosen = { id: null, from: null, over: false };

function choose(id, from) {
  Object.assign(chosen, { id, from, over: false });
  showChosen().then(
    () => $("detail").focus(),
    () => {},
  );
}

$("back").addEventListener("click", () => {
  if (chosen.from?.isConnected) chosen.from.focus();
  else $("decisions").focus();
});

async function showChosen() {
  const { id } = chosen;
  if (!id || chosen.over) return;
  const task = await read(`/v1/tasks/${encodeURIComponent(id)}`);
  if (id !== chosen.id) return;
  chosen.over = FINAL.has(task.state);
  const { request, record } = task;
  set($("detail-title"), `Task ${id}`);
  $("detail-none").hidden = true;
  $("back").hidden = false;
  const policy = task.policy ?? record?.policy;
  const expected = task.expected_s ?? record?.expected_s;
  const running = chosen.over ? "" : `, ${percent(task.progress ?? 0)} done`;
  const facts = [
    ["state", `${task.state}${running}${task.attempt > 1 ? `, attempt ${task.attempt}` : ""}`],
    ["asked by", `${request.device}: ${request.images} × ${request.model} ${request.label}`.trim()],
    ["server", task.server ?? "none yet"],
    ["decided by", policy ?? "-"],
    ["expected", seconds(expected)],
    ["latency", record ? `${seconds(record.latency_s)} of ${seconds(request.deadline_s)}` : `deadline ${seconds(request.deadline_s)}`],
  ];
  if (record) {
    const parts = [["before it was sent", "wait_to_slot_s"], ["way there", "upload_s"], ["queue", "queue_s"], ["loading", "switch_s"], ["service", "service_s"], ["way back", "download_s"]];
    facts.push(["of it", parts.map(([name, field]) => `${name} ${seconds(record[field])}`).join(", ")]);
  }
  if (task.fallback) facts.push(["plain rule", task.fallback]);
  if (task.error) facts.push(["error", task.error]);
  $("detail-facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  showScores($("detail-scores"), task.scores, task.server);
  $("detail-photo").hidden = true;
  if (isPhoto(task)) {
    const url = await photo(id);
    if (url && id === chosen.id) {
      $("detail-photo").src = url;
      $("detail-photo").alt = `First photo of task ${id}: ${request.label || "first class"}`;
      $("detail-photo").hidden = false;
    }
  }
}

const photos = new Map(); // promises of the addresses of photos in memory, by task; of null where there is none
const isPhoto = (task) => task.state === "done" && task.record?.kind === "application/zip";

function photo(id) {
  if (!photos.has(id)) {
    const path = `/v1/tasks/${encodeURIComponent(id)}/preview.png`;
    const loaded = ask(path).then(async (answer) => URL.createObjectURL(await answer.blob()));
    photos.set(
      id,
      loaded.catch((error) => {
        if (error instanceof LockedError) photos.delete(id); // others have no photo, and are not asked again
        return null;
      }),
    );
  }
  return photos.get(id);
}

async function readGallery() {
  if (still($("gallery"))) return;
  const done = (await read("/v1/tasks?state=done&limit=50")).tasks;
  const drawn = done.filter(isPhoto).slice(0, MOST_PHOTOS);
  const urls = new Map(await Promise.all(drawn.map(async (task) => [task.id, await photo(task.id)])));
  const shown = drawn.filter((task) => urls.get(task.id));
  sync(
    $("gallery"),
    shown,
    (task) => task.id,
    (task) => {
      const { request, server } = task;
      const row = make("li");
      const button = make("button");
      const image = make("img");
      const label = request.label || "first class";
      image.src = urls.get(task.id);
      image.alt = `${label}, drawn by ${server}`;
      button.type = "button";
      button.append(image, make("span", "label", label), make("span", "", `${server}, ${count(request.images, "photo")}`), make("span", "", task.id));
      button.addEventListener("click", () => choose(task.id, button));
      row.append(button);
      return row;
    },
    () => {},
  );
  const kept = new Set([...drawn.map((task) => task.id), chosen.id]);
  for (const [id, loading] of photos) {
    if (kept.has(id)) continue;
    photos.delete(id);
    loading.then((url) => url && URL.revokeObjectURL(url));
  }
  const none = done.length ? "The last results hold no photos: their servers only take the time of a task." : "No task is done yet.";
  set($("gallery-text"), shown.length ? "The first photo of the newest results. Choose one to see how it came about." : none);
}

// ---------------------------------------------------------------- what runs

const ticks = [
  every(STATE_EVERY_MS, readState),
  every(STATE_EVERY_MS, showChosen),
  every(TASKS_EVERY_MS, readTasks),
  every(GALLERY_EVERY_MS, readGallery),
];
const run = () => ticks.forEach((tick) => tick());

$("state").addEventListener("change", () => readTasks().catch(() => {}));
document.addEventListener("visibilitychange", run);
let drawnWidth = 0;
new ResizeObserver(() => {
  if (!latest || $("board").clientWidth === drawnWidth) return;
  drawnWidth = $("board").clientWidth;
  showHall();
  showCharts();
}).observe($("board"));

run();
follow();
