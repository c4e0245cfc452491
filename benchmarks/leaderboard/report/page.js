// The matrix shows its first rows; a press shows all.
document.querySelectorAll('.matrix').forEach(matrix => {
  const more = matrix.querySelectorAll('tr.more').length;
  if (!more) return;
  matrix.classList.add('folded');
  const tools = document.createElement('div');
  tools.className = 'tools';
  const all = button('show ' + more + ' more contestants', () => {
    const folded = matrix.classList.toggle('folded');
    all.textContent = folded ? 'show ' + more + ' more contestants' : 'show fewer contestants';
  });
  tools.appendChild(all);
  matrix.after(tools);
});
