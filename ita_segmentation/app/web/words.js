// Chips of class words. Runs with `element`, `props` and `watch`; `props.value` is the list of words.
// Words are only ever written as text, never as HTML.
const part = (name) => element.querySelector(name);
const list = part('.ita-chips'), input = part('.ita-word'), clear = part('.ita-clear'), remark = part('.ita-remark');
const own = props.own_words || [], most = props.max_classes, longest = props.max_characters;

const words = () => Array.from(props.value || []);
const namesOf = (text) => text.split('|').map((name) => name.trim().replace(/\s+/g, ' ')).filter(Boolean);
const keyOf = (text) => namesOf(text).map((name) => name.toLowerCase()).sort().join('|');
const counted = (count, noun) => count.toLocaleString('en') + ' ' + noun + (count === 1 ? '' : 'es');

function chip(text, index) {
  const item = document.createElement('li');
  item.className = 'ita-chip';
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
    props.value = words().filter((_, place) => place !== index);
    draw();
    const rest = list.querySelectorAll('button');
    (rest[Math.min(index, rest.length - 1)] || input).focus();
  });
  item.append(remove);
  return item;
}

function draw() {
  const now = words();
  list.replaceChildren(...now.map(chip));
  list.hidden = !now.length;
  clear.hidden = !now.length;
  part('.ita-count').textContent = now.length ? counted(now.length, 'class') : '';
  input.placeholder = now.length ? 'Add a word' : own.length ? 'Such as cat, sofa|couch' : 'cat, sofa|couch';
  part('.ita-own').hidden = Boolean(now.length) || !own.length;
}

function add(text) {
  const typed = text.split(/[,，、;\n\r]+/).map((one) => namesOf(one).join('|')).filter(Boolean);
  if (!typed.length) return;
  const now = words(), known = new Set(now.map(keyOf));
  let repeated = 0, long = 0, over = 0;
  for (const word of typed) {
    if (known.has(keyOf(word))) repeated += 1;
    else if (namesOf(word).some((name) => name.length > longest)) long += 1;
    else if (now.length >= most) over += 1;
    else {
      now.push(word);
      known.add(keyOf(word));
    }
  }
  const remarks = [];
  if (repeated) remarks.push(repeated === 1 ? 'That class is there already.' : repeated + ' classes are there already.');
  if (long) remarks.push('A word may have up to ' + longest + ' characters.');
  if (over) remarks.push('Up to ' + counted(most, 'class') + '; ' + over.toLocaleString('en') + ' left out.');
  remark.textContent = remarks.join(' ');
  props.value = now;
  draw();
  part('.ita-box').scrollTop = part('.ita-box').scrollHeight;
}

function take() {
  const text = input.value;
  input.value = '';
  add(text);
}

input.addEventListener('keydown', (event) => {
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === 'Enter' || event.key === ',') {
    event.preventDefault();
    take();
  } else if (event.key === 'Backspace' && !input.value && words().length) {
    props.value = words().slice(0, -1);
    draw();
  }
});
input.addEventListener('input', (event) => {
  if (!event.isComposing && /[,，、;\n]/.test(input.value)) take();
});
input.addEventListener('paste', (event) => {
  const text = (event.clipboardData || window.clipboardData).getData('text');
  if (!/[,，、;\n]/.test(text)) return;
  event.preventDefault();
  add(input.value + text);
  input.value = '';
});
input.addEventListener('blur', take);
clear.addEventListener('click', () => {
  props.value = [];
  remark.textContent = '';
  draw();
  input.focus();
});
part('.ita-box').addEventListener('click', (event) => {
  if (event.target === event.currentTarget || event.target === list) input.focus();
});

part('.ita-help').textContent =
  'Enter or a comma adds a class; a bar joins synonyms, as in sofa|couch.' +
  (own.length ? ' Without words, the model’s own ' + counted(own.length, 'class') + ' are used.' : '');
part('.ita-own summary').textContent = 'The model’s own ' + counted(own.length, 'class');
part('.ita-own p').textContent = own.join(', ');
watch('value', draw);
draw();
