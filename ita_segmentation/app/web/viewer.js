// The result: image, colors, legend, downloads. Runs with `element`, `props` and `watch`; `props.value` is what
// `view_of_result` gives. Hover, click and opacity need no server. Names are written as text only.
const part = (name) => element.querySelector(name);
const root = part('.ita-viewer'), stage = part('.ita-stage'), tip = part('.ita-tip'), legend = part('.ita-legend');
const layers = ['.ita-image', '.ita-colors', '.ita-marks'].map(part);
const [base, colors, marks] = layers;
const opacity = part('#ita-opacity');
const OUTLINE_SHADE = 0.45, VEIL = [18, 18, 24, 190], REST_OPACITY = 55;

let view = null, ids = null, segmentOf = new Map(), classOf = new Map(), boxOf = new Map();
let isolated = null, hovered = null, drawn = 0, asked = 0;

const percent = (share) => (share < 0.001 ? '< 0.1' : (100 * share).toFixed(share < 0.1 ? 1 : 0)) + ' %';
const counted = (count, noun) => count.toLocaleString('en') + ' ' + noun + (count === 1 ? '' : 's');
const scored = (score) => (score === null || score === undefined ? '' : score.toFixed(2));

function load(uri) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error('an image of the answer cannot be shown'));
    image.src = uri;
  });
}

function readIds(source) {
  const canvas = new OffscreenCanvas(source.width, source.height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  const data = context.getImageData(0, 0, source.width, source.height).data;
  const found = new Uint16Array(source.width * source.height);
  for (let place = 0; place < found.length; place += 1) found[place] = data[4 * place] | (data[4 * place + 1] << 8);
  return found;
}

function boxes(width) {
  const found = new Map();
  for (let place = 0; place < ids.length; place += 1) {
    const x = place % width, y = (place - x) / width, box = found.get(ids[place]);
    if (!box) found.set(ids[place], [x, y, x, y]);
    else {
      if (x < box[0]) box[0] = x;
      if (x > box[2]) box[2] = x;
      box[3] = y;
    }
  }
  return found;
}

// Which pixels have another segment at their right or beneath them.
function isEdge(place, width) {
  const id = ids[place];
  return ((place + 1) % width && ids[place + 1] !== id) || (place + width < ids.length && ids[place + width] !== id);
}

function paintColors() {
  const { width, height } = colors, context = colors.getContext('2d');
  const painted = context.createImageData(width, height), data = new Uint32Array(painted.data.buffer);
  const pack = (color, shade) => (255 << 24 | color[2] * shade << 16 | color[1] * shade << 8 | color[0] * shade) >>> 0;
  const plain = new Map(), dark = new Map();
  for (const segment of view.segments) {
    const entry = classOf.get(segment.class);
    if (isolated !== null && isolated !== segment.class) continue;
    plain.set(segment.id, pack(entry.color, 1));
    dark.set(segment.id, pack(entry.color, OUTLINE_SHADE));
  }
  for (let place = 0; place < ids.length; place += 1) {
    const color = plain.get(ids[place]);
    if (color !== undefined) data[place] = isEdge(place, width) ? dark.get(ids[place]) : color;
  }
  context.putImageData(painted, 0, 0);
}

// The veil over all other classes, and the outline of what the pointer is on.
function paintMarks() {
  const { width, height } = marks, context = marks.getContext('2d');
  context.clearRect(0, 0, width, height);
  if (isolated !== null) {
    const painted = context.createImageData(width, height);
    for (let place = 0; place < ids.length; place += 1) {
      const segment = segmentOf.get(ids[place]);
      if (!segment || segment.class !== isolated) painted.data.set(VEIL, 4 * place);
    }
    context.putImageData(painted, 0, 0);
  }
  if (hovered !== null) for (const id of hovered) outline(context, id);
}

function outline(context, id) {
  const box = boxOf.get(id), { width, height } = marks;
  if (!box) return;
  const reach = Math.max(1, Math.round(Math.max(width, height) / 500));
  context.fillStyle = '#fff';
  context.shadowColor = '#000';
  context.shadowBlur = 2 * reach;
  for (let y = box[1]; y <= box[3]; y += 1) {
    for (let x = box[0]; x <= box[2]; x += 1) {
      const place = y * width + x;
      if (ids[place] !== id) continue;
      const inside =
        x > 0 && ids[place - 1] === id && x < width - 1 && ids[place + 1] === id &&
        y > 0 && ids[place - width] === id && y < height - 1 && ids[place + width] === id;
      if (!inside) context.fillRect(x - (reach >> 1), y - (reach >> 1), reach, reach);
    }
  }
  context.shadowBlur = 0;
}

function hover(segments) {
  const same = segments === hovered || (segments && hovered && segments.join() === hovered.join());
  if (same) return;
  hovered = segments;
  const on = segments && segmentOf.get(segments[0]);
  for (const button of legend.querySelectorAll('button'))
    button.classList.toggle('ita-on', Boolean(on) && Number(button.dataset.class) === on.class);
  paintMarks();
}

function isolate(index) {
  isolated = isolated === index ? null : index;
  for (const button of legend.querySelectorAll('button'))
    button.setAttribute('aria-pressed', String(Number(button.dataset.class) === isolated));
  part('.ita-all').hidden = isolated === null;
  root.dataset.isolated = isolated === null ? '' : classOf.get(isolated).name;
  summarize();
  paintColors();
  paintMarks();
}

function segmentAt(event) {
  const box = marks.getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left) / box.width * marks.width);
  const y = Math.floor((event.clientY - box.top) / box.height * marks.height);
  if (x < 0 || y < 0 || x >= marks.width || y >= marks.height) return null;
  return segmentOf.get(ids[y * marks.width + x]) || null;
}

function showTip(event, segment) {
  const entry = classOf.get(segment.class);
  const name = document.createElement('strong'), rest = document.createElement('span');
  name.textContent = entry.name;
  name.dir = 'auto';
  rest.textContent = [scored(segment.score) && 'score ' + scored(segment.score), percent(segment.share)]
    .filter(Boolean).join(' · ');
  tip.replaceChildren(name, rest);
  tip.style.setProperty('--ita-color', 'rgb(' + entry.color.join(',') + ')');
  tip.hidden = false;
  const box = stage.getBoundingClientRect();
  const left = Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4);
  const above = event.clientY - box.top - tip.offsetHeight - 10;
  tip.style.left = Math.max(4, left) + 'px';
  tip.style.top = (above < 4 ? event.clientY - box.top + 18 : above) + 'px';
}

function legendEntry(entry) {
  const item = document.createElement('li'), button = document.createElement('button');
  button.type = 'button';
  button.dataset.class = entry.class;
  button.setAttribute('aria-pressed', 'false');
  const cells = [
    ['ita-swatch', ''],
    ['ita-name', entry.name],
    ['ita-more', entry.count > 1 ? '× ' + entry.count : ''],
    ['ita-score', scored(entry.score)],
    ['ita-share', percent(entry.share)],
  ].map(([name, text]) => {
    const cell = document.createElement('span');
    cell.className = name;
    cell.dir = 'auto';
    cell.textContent = text;
    return cell;
  });
  cells[0].style.background = 'rgb(' + entry.color.join(',') + ')';
  const score = scored(entry.score);
  const spoken = [entry.name, entry.count > 1 ? counted(entry.count, 'segment') : '',
    score && 'score ' + score, percent(entry.share) + ' of the image'];
  button.setAttribute('aria-label', spoken.filter(Boolean).join(', '));
  if (entry.synonyms.length) button.title = [entry.name, ...entry.synonyms].join(' | ');
  button.append(...cells);
  const own = view.segments.filter((segment) => segment.class === entry.class).map((segment) => segment.id);
  for (const name of ['mouseenter', 'focus']) button.addEventListener(name, () => hover(own));
  for (const name of ['mouseleave', 'blur']) button.addEventListener(name, () => hover(null));
  button.addEventListener('click', () => isolate(entry.class));
  item.append(button);
  return item;
}

function summarize() {
  const alone = isolated === null ? '' : ' Shown alone: ' + classOf.get(isolated).name + '.';
  const what = view.classes.length
    ? counted(view.segments.length, 'segment') + ' of ' + view.classes.length +
      (view.classes.length === 1 ? ' class' : ' classes')
    : 'No segment is sure enough: try a lower minimum score, or other class names';
  const where = view.width.toLocaleString('en') + ' × ' + view.height.toLocaleString('en') + ' pixels';
  part('.ita-summary').textContent = what + ' · ' + where + ' · ' + view.seconds.toFixed(1) + ' s.' + alone;
}

async function show() {
  const turn = (drawn += 1), value = props.value;
  asked = window.itaAsked || 0;
  markOutdated();
  tip.hidden = true;
  part('.ita-message').textContent = value && value.error ? value.error : '';
  if (!value || value.error) {
    root.dataset.state = value ? 'error' : 'empty';
    root.dataset.run = value ? value.run : '';
    return;
  }
  const [shown, idMap] = await Promise.all([load(value.image), load(value.ids)]);
  if (turn !== drawn) return; // a newer answer has come
  view = value;
  isolated = hovered = null;
  for (const layer of layers) [layer.width, layer.height] = [idMap.width, idMap.height];
  base.getContext('2d').drawImage(shown, 0, 0);
  ids = readIds(idMap);
  boxOf = boxes(idMap.width);
  segmentOf = new Map(view.segments.map((segment) => [segment.id, segment]));
  classOf = new Map(view.classes.map((entry) => [entry.class, entry]));
  stage.style.setProperty('--ita-ratio', idMap.width / idMap.height);
  stage.classList.toggle('ita-small', idMap.width < 480);
  legend.replaceChildren(...view.classes.map(legendEntry));
  part('.ita-all').hidden = true;
  part('.ita-remarks').textContent = view.remarks.join(' ');
  const absent = part('.ita-absent'), hidden = view.absent_count - view.absent.length;
  absent.hidden = !view.absent.length;
  absent.querySelector('summary').textContent = 'Not found: ' + view.absent_count.toLocaleString('en') + (view.absent_count === 1 ? ' class' : ' classes');
  absent.querySelector('p').textContent = view.absent.join(', ') + (hidden ? ', and ' + hidden + ' more' : '');
  part('pre').textContent = view.python;
  const names = view.classes.slice(0, 8).map((entry) => entry.name).join(', ');
  base.setAttribute('aria-label', view.name + ', segmented' + (names ? ': ' + names : ''));
  summarize();
  paintColors();
  paintMarks();
  root.dataset.isolated = '';
  root.dataset.state = 'result';
  root.dataset.run = view.run;
}

// The page counts changes of its inputs, and notes the count when Segment is pressed.
function markOutdated() {
  root.classList.toggle('ita-outdated', (window.itaInputs || 0) !== asked);
}

function setOpacity() {
  colors.style.opacity = opacity.value / 100;
  part('output').textContent = opacity.value + ' %';
}

// What is on the screen, with a legend beneath it.
function overlayCanvas() {
  const entries = view.classes.filter((entry) => isolated === null || entry.class === isolated);
  const text = Math.max(12, Math.min(26, Math.round(Math.sqrt(base.width * base.height) / 36)));
  const font = text + 'px system-ui, sans-serif', row = Math.round(1.6 * text), gap = Math.round(0.7 * text);
  const line = (entry) => [entry.name, scored(entry.score)].filter(Boolean).join('  ');
  const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
  context.font = font;
  const widest = Math.max(...entries.map((entry) => context.measureText(line(entry)).width), 0);
  const column = Math.min(base.width, Math.ceil(widest) + text + 3 * gap);
  const columns = Math.max(1, Math.floor((base.width - gap) / column));
  const rows = Math.ceil(entries.length / columns);
  canvas.width = base.width;
  canvas.height = base.height + (rows ? rows * row + 2 * gap : 0);
  context.fillStyle = '#fff';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(base, 0, 0);
  context.globalAlpha = opacity.value / 100;
  context.drawImage(colors, 0, 0);
  context.globalAlpha = 1;
  hover(null);
  context.drawImage(marks, 0, 0);
  context.font = font;
  context.textBaseline = 'middle';
  entries.forEach((entry, place) => {
    const x = gap + Math.floor(place / rows) * column, y = base.height + gap + (place % rows) * row;
    context.fillStyle = 'rgb(' + entry.color.join(',') + ')';
    context.fillRect(x, y + (row - text) / 2, text, text);
    context.fillStyle = '#181818';
    context.fillText(line(entry), x + text + gap, y + row / 2, column - text - 2 * gap);
  });
  return canvas;
}

function save(blob, ending) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = view.name.replace(/\.[^.]*$/, '') + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function bytesOf(uri) {
  return Uint8Array.from(atob(uri.slice(uri.indexOf(',') + 1)), (one) => one.charCodeAt(0));
}

const downloads = {
  overlay: () => overlayCanvas().toBlob((blob) => save(blob, '_overlay.png'), 'image/png'),
  labels: () => save(new Blob([bytesOf(view.labels)], { type: 'image/png' }), '_labels.png'),
  coco: () => save(new Blob([view.coco], { type: 'application/json' }), '_coco.json'),
  python: () => save(new Blob([view.python], { type: 'text/x-python' }), '_segment.py'),
};

async function copy() {
  const button = part('.ita-copy');
  try {
    await navigator.clipboard.writeText(view.python);
    button.textContent = 'Copied';
  } catch {
    getSelection().selectAllChildren(part('pre'));
    button.textContent = 'Selected: press Ctrl+C';
  }
  setTimeout(() => { button.textContent = 'Copy'; }, 2000);
}

marks.addEventListener('pointermove', (event) => {
  const segment = segmentAt(event);
  hover(segment && [segment.id]);
  if (segment) showTip(event, segment);
  else tip.hidden = true;
});
marks.addEventListener('pointerleave', () => {
  tip.hidden = true;
  hover(null);
});
marks.addEventListener('click', (event) => {
  const segment = segmentAt(event);
  if (segment) isolate(segment.class);
  else if (isolated !== null) isolate(isolated);
});
element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && isolated !== null) isolate(isolated);
});
part('.ita-all').addEventListener('click', () => isolate(isolated));
part('.ita-downloads').addEventListener('click', (event) => {
  const what = event.target.dataset.what;
  if (what && view) downloads[what]();
});
part('.ita-copy').addEventListener('click', copy);
window.addEventListener('ita-inputs', markOutdated);
opacity.addEventListener('input', setOpacity);
opacity.value = REST_OPACITY;
setOpacity();
watch('value', show);
show();
