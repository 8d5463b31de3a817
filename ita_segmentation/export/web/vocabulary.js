// What a vocabulary is, by the rules of ita_onnx/vocabulary.py.

export const OTHER = 'other';

// JavaScript has no case folding; upper case first makes ß and ss one.
export const normalForm = (name) =>
  name.normalize('NFC').toUpperCase().toLowerCase().trim().split(/\s+/).join(' ');

export function distinct(names) {
  const first = new Map();
  for (const name of names) if (!first.has(normalForm(name))) first.set(normalForm(name), name);
  return [...first.values()];
}

export function isDuplicate(classes) {
  const first = new Map();
  return classes.map((names, index) => {
    const key = JSON.stringify([...new Set(names.map(normalForm))].sort());
    if (!first.has(key)) first.set(key, index);
    return first.get(key) !== index;
  });
}

export function classesAmong(classes, names) {
  const known = new Set(names.map(normalForm));
  return classes.map((synonyms) => synonyms.some((name) => known.has(normalForm(name))));
}

const singularAndPlural = (name) => {
  const form = normalForm(name);
  return [form, form + 's', form + 'es', form.replace(/y$/, '') + 'ies'];
};

// The checkpoint's classes that share no name with a given one come after those, and compete with them.
export function withDistractors(classes, own, trained) {
  const result = classes.map((names) => [...names]);
  if (result.length >= Math.max(own.length, trained.length)) return result;
  const known = new Set(result.flat().flatMap(singularAndPlural));
  for (const names of [...own, ...trained]) {
    const forms = names.flatMap(singularAndPlural);
    if (forms.some((form) => known.has(form))) continue;
    result.push(names);
    for (const form of forms) known.add(form);
  }
  return result;
}
