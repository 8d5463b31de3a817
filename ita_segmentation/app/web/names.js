// Tags of class names. Runs with `element`, `props` and `watch`; `props.value` is the list of classes.
// Names are only ever written as text, never as HTML.
const part = (name) => element.querySelector(name);
const list = part('.ita-tags'), input = part('.ita-input'), clear = part('.ita-clear'), remark = part('.ita-remark');
const own = props.own_names || [], most = props.max_names, longest = props.max_characters;
const SEPARATORS = /[,;\n\r]+/;

const classes = () => Array.from(props.value || []);
const namesOf = (text) => text.split('|').map((name) => name.trim().replace(/\s+/g, ' ')).filter(Boolean);
const keyOf = (text) => namesOf(text).map((name) => name.toLowerCase()).sort().join('|');
const counted = (count, noun, plural) => count.toLocaleString('en') + ' ' + (count === 1 ? noun : plural);

function tag(text, index) {
  const item = document.createElement('li');
  item.className = 'ita-tag';
  const names = namesOf(text);
  names.forEach((name, place) => {
    const span = document.createElement('span');
    span.className = place ? 'ita-synonym' : 'ita-name';
    span.dir = 'auto';
    span.textContent = name;
    item.append(span);
  });
  const remove = document.createElement('button');
  remove.type = 'button';
  remove.textContent = '×';
  remove.setAttribute('aria-label', 'Remove ' + names.join(' or '));
  remove.addEventListener('click', () => {
    change(classes().filter((_, place) => place !== index));
    const rest = list.querySelectorAll('button');
    (rest[Math.min(index, rest.length - 1)] || input).focus();
  });
  item.append(remove);
  return item;
}

function change(value) {
  props.value = value;
  draw();
}

function draw() {
  const now = classes();
  list.replaceChildren(...now.map(tag));
  list.hidden = !now.length;
  clear.hidden = !now.length;
  part('.ita-count').textContent = now.length ? counted(now.length, 'class', 'classes') : '';
  input.placeholder = now.length ? 'Add a class' : own.length ? 'Such as cat, sofa|couch' : 'cat, sofa|couch';
  part('.ita-own').hidden = Boolean(now.length) || !own.length;
}

function add(text) {
  const typed = text.split(SEPARATORS).map((one) => namesOf(one).join('|')).filter(Boolean);
  if (!typed.length) return;
  const now = classes(), known = new Set(now.map(keyOf));
  let repeated = 0, long = 0, over = 0, names = now.reduce((sum, one) => sum + namesOf(one).length, 0);
  for (const one of typed) {
    const count = namesOf(one).length;
    if (known.has(keyOf(one))) repeated += 1;
    else if (namesOf(one).some((name) => name.length > longest)) long += 1;
    else if (names + count > most) over += count;
    else {
      now.push(one);
      known.add(keyOf(one));
      names += count;
    }
  }
  const remarks = [];
  if (repeated) remarks.push(repeated === 1 ? 'That class is there already.' : repeated + ' classes are there already.');
  if (long) remarks.push('A name may have up to ' + longest + ' characters.');
  if (over) remarks.push('Up to ' + counted(most, 'name', 'names') + '; ' + over.toLocaleString('en') + ' left out.');
  remark.textContent = remarks.join(' ');
  change(now);
  part('.ita-box').scrollTop = part('.ita-box').scrollHeight;
}

function take() {
  const text = input.value;
  input.value = '';
  add(text);
}

input.addEventListener('keydown', (event) => {
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === 'Enter' || event.key === ',' || event.key === ';') {
    event.preventDefault();
    take();
  } else if (event.key === 'Backspace' && !input.value && classes().length) {
    change(classes().slice(0, -1));
  }
});
input.addEventListener('input', (event) => {
  if (!event.isComposing && SEPARATORS.test(input.value)) take();
});
input.addEventListener('paste', (event) => {
  const text = (event.clipboardData || window.clipboardData).getData('text');
  if (!SEPARATORS.test(text)) return;
  event.preventDefault();
  add(input.value + text);
  input.value = '';
});
input.addEventListener('blur', take);
clear.addEventListener('click', () => {
  remark.textContent = '';
  change([]);
  input.focus();
});
part('.ita-box').addEventListener('click', (event) => {
  if (event.target === event.currentTarget || event.target === list) input.focus();
});

part('.ita-help').textContent = 'Enter or a comma adds a class; a bar joins synonyms.';
part('.ita-own summary').textContent =
  'Without names, the model’s own ' + counted(own.length, 'class', 'classes') + ' are used';
part('.ita-own p').textContent = own.join(', ');
watch('value', draw);
draw();
