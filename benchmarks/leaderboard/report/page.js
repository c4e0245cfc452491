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
