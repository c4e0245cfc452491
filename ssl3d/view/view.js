// A gallery shows some cards at a time: those that the search and the filters leave, in the order chosen.
const AT_ONCE = 24;
const written = number => number.toLocaleString('en');
document.querySelectorAll('.gallery').forEach(gallery => {
  const controls = gallery.previousElementSibling;
  const cards = Array.from(gallery.children);
  const search = controls.querySelector('input[type=search]');
  const filters = Array.from(controls.querySelectorAll('select[data-f]'));
  const order = controls.querySelector('select.order');
  const outlines = controls.querySelector('input.toggle');
  const pages = controls.querySelector('.pages');
  const texts = cards.map(card => card.textContent.toLowerCase());
  const said = document.createElement('span');
  const page = document.createElement('input');
  let first = 0;
  let kept = cards;

  function show() {
    const shown = new Set(kept.slice(first, first + AT_ONCE));
    cards.forEach(card => { card.hidden = !shown.has(card); });
    kept.forEach(card => { if (shown.has(card)) gallery.appendChild(card); });
    const noun = controls.dataset.noun + (kept.length === 1 ? '' : 's');
    said.textContent = kept.length
      ? written(first + 1) + '–' + written(first + shown.size) + ' of ' + written(kept.length) + ' ' + noun
      : 'no ' + noun;
    page.value = 1 + first / AT_ONCE;
    page.max = Math.max(1, Math.ceil(kept.length / AT_ONCE));
    before.disabled = first === 0;
    after.disabled = first + AT_ONCE >= kept.length;
  }

  function choose() {
    const words = search.value.trim().toLowerCase();
    kept = cards.filter((card, number) => texts[number].includes(words) &&
      filters.every(filter => !filter.value || card.dataset[filter.dataset.f] === filter.value));
    const key = order && order.value;
    if (key) {
      const value = card => card.dataset[key] === '' ? Infinity : Number(card.dataset[key]);
      kept.sort((a, b) => value(a) - value(b));
    }
    first = 0;
    show();
  }

  function move(step) {
    first = Math.min(Math.max(first + step * AT_ONCE, 0), Math.max(kept.length - 1, 0));
    show();
  }

  const before = button('←', () => move(-1));
  const after = button('→', () => move(1));
  before.setAttribute('aria-label', 'earlier');
  after.setAttribute('aria-label', 'later');
  Object.assign(page, { type: 'number', min: 1 });
  page.setAttribute('aria-label', 'page');
  page.addEventListener('change', () => {
    first = 0;
    move(Math.min(Math.max(Math.round(page.value) || 1, 1), page.max) - 1);
  });
  pages.append(said, before, page, after);
  [search, ...filters, ...(order ? [order] : [])].forEach(own => own.addEventListener('input', choose));
  if (outlines) outlines.addEventListener('input', () => gallery.classList.toggle('plain', !outlines.checked));
  show();
});
