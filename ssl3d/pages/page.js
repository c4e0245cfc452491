// Sorts a table by the column whose heading is pressed; cells without a key stay last.
function compare(a, b, column, up) {
  const x = a.cells[column].dataset.v, y = b.cells[column].dataset.v;
  if (x === '' || y === '') return (x === '') - (y === '');
  let order = Number(x) - Number(y);
  if (isNaN(order)) order = x.localeCompare(y, undefined, {numeric: true});
  return up ? order : -order;
}

document.querySelectorAll('table.sort').forEach(table => {
  const headings = table.querySelectorAll('thead th');
  headings.forEach((heading, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = heading.textContent;
    heading.textContent = '';
    heading.appendChild(button);
    button.addEventListener('click', () => {
      const up = heading.getAttribute('aria-sort') !== 'ascending';
      headings.forEach(other => other.removeAttribute('aria-sort'));
      heading.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const body = table.tBodies[0];
      Array.from(body.rows).sort((a, b) => compare(a, b, column, up)).forEach(row => body.appendChild(row));
    });
  });
});

// Saves a text as a file of the reader's.
function save(name, type, content) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([content], {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function fileName(words, ending) {
  return words.toLowerCase().replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, '').slice(0, 80) + ending;
}

function button(words, act) {
  const made = document.createElement('button');
  made.type = 'button';
  made.textContent = words;
  made.addEventListener('click', act);
  return made;
}

// A cell's words, without the settings and notes that stand below a name.
function wordsOf(cell) {
  const copy = cell.cloneNode(true);
  copy.querySelectorAll('small').forEach(small => small.remove());
  return copy.textContent.trim();
}

function linesOf(table) {
  return Array.from(table.rows).map(row =>
    Array.from(row.cells).filter(cell => !cell.hidden).map(wordsOf));
}

function csv(lines) {
  const cell = words => {
    const safe = /^[=+@\t\r]|^-(?![\d.])/.test(words) && isNaN(words) ? "'" + words : words;
    return /[",\n]/.test(safe) ? '"' + safe.replace(/"/g, '""') + '"' : safe;
  };
  return lines.map(line => line.map(cell).join(',')).join('\n') + '\n';
}

function latex(lines, caption) {
  const signs = {'±': '$\\pm$', '–': '--', '−': '$-$', '↓': '$\\downarrow$', '<': '$<$', '>': '$>$', '\u00a0': '~',
    '●': '$\\bullet$', '≤': '$\\le$', '…': '\\dots{}'};
  const plain = words => words.replace(/\\/g, '\\textbackslash ').replace(/[&%$#_{}]/g, sign => '\\' + sign)
    .replace(/~/g, '\\textasciitilde{}').replace(/\^/g, '\\textasciicircum{}')
    .replace(/[±–−↓<>\u00a0●≤…]/g, sign => signs[sign]);
  const rows = lines.map(line => line.map(plain).join(' & ') + ' \\\\');
  return '% needs \\usepackage{booktabs}\n\\begin{table}\n\\caption{' + plain(caption) + '}\n\\begin{tabular}{l' +
    'r'.repeat(lines[0].length - 1) + '}\n\\toprule\n' + rows[0] + '\n\\midrule\n' + rows.slice(1).join('\n') +
    '\n\\bottomrule\n\\end{tabular}\n\\end{table}\n';
}

// Columns of a table can be chosen, and the table saved as it is shown.
document.querySelectorAll('table.sort').forEach(table => {
  const caption = table.caption.textContent;
  const tools = document.createElement('div');
  tools.className = 'tools';
  const names = Array.from(table.tHead.rows[0].cells).map(wordsOf);
  if (names.length > 3) {
    const choice = document.createElement('details');
    choice.appendChild(document.createElement('summary')).textContent = 'columns';
    names.slice(1).forEach((name, number) => {
      const label = choice.appendChild(document.createElement('label'));
      const box = label.appendChild(document.createElement('input'));
      box.type = 'checkbox';
      box.checked = true;
      label.append(' ' + name);
      box.addEventListener('change', () =>
        Array.from(table.rows).forEach(row => { row.cells[number + 1].hidden = !box.checked; }));
    });
    tools.appendChild(choice);
  }
  tools.appendChild(button('CSV', () => save(fileName(caption, '.csv'), 'text/csv', csv(linesOf(table)))));
  tools.appendChild(button('LaTeX', () => save(fileName(caption, '.tex'), 'text/plain', latex(linesOf(table), caption))));
  table.parentElement.before(tools);
});

// A figure as SVG, with the colours that it has here, and its numbers as CSV.
const LOOKS = ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-size', 'font-weight', 'font-family'];

function drawing(svg) {
  const copy = svg.cloneNode(true);
  const ours = svg.querySelectorAll('*');
  copy.querySelectorAll('*').forEach((element, number) => {
    const style = getComputedStyle(ours[number]);
    LOOKS.forEach(look => element.style.setProperty(look, style.getPropertyValue(look)));
  });
  const [, , width, height] = svg.getAttribute('viewBox').split(' ');
  copy.setAttribute('width', width);
  copy.setAttribute('height', height);
  copy.style.cssText = 'background:' + getComputedStyle(document.body).backgroundColor;
  return new XMLSerializer().serializeToString(copy);
}

function numbers(svg) {
  const lines = [['name', 'value', 'at', 'low', 'high']];
  svg.querySelectorAll('title').forEach(title => {
    const found = /^(.*): ([+−-]?[\d.]+)(?: at (\S+))?(?: \[(\S+), (\S+)\])?$/.exec(title.textContent);
    if (found) lines.push(found.slice(1).map(words => words || ''));
  });
  return csv(lines);
}

document.querySelectorAll('figure').forEach(figure => {
  const svg = figure.querySelector('svg');
  if (!svg) return;
  const name = svg.getAttribute('aria-label');
  const tools = figure.appendChild(document.createElement('div'));
  tools.className = 'tools';
  tools.appendChild(button('SVG', () => save(fileName(name, '.svg'), 'image/svg+xml', drawing(svg))));
  tools.appendChild(button('CSV', () => save(fileName(name, '.csv'), 'text/csv', numbers(svg))));
});

document.querySelectorAll('p.copy').forEach(paragraph => {
  const tools = document.createElement('div');
  tools.className = 'tools';
  tools.appendChild(button('copy', () => navigator.clipboard.writeText(paragraph.textContent)));
  paragraph.after(tools);
});

// A link to a folded table opens it; on paper everything is open.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === 'DETAILS') { target.open = true; target.scrollIntoView(); }
}
addEventListener('hashchange', unfold);
unfold();
addEventListener('beforeprint', () =>
  document.querySelectorAll('details.paper, .board > details').forEach(own => { own.open = true; }));
