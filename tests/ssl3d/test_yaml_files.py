import pytest

from ssl3d.yaml_files import MOST_VALUES, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e13", 2e13),
        ("-1.5E+3", -1500.0),
        (".5e-3", 0.0005),
        ("1e", "1e"),
        ("e5", "e5"),
        ("12e03x", "12e03x"),
        ("'2e13'", "2e13"),
        ("0x1e5", 0x1E5),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text, value):
    parsed = parse_yaml(f"a: {text}")["a"]
    assert parsed == value and type(parsed) is type(value)
    assert parse_yaml(dump_yaml({"a": value})) == {"a": value}


LEVELS = [f"y{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n".join(["x: &a [x,x,x,x,x,x,x,x,x]", *LEVELS]), f"more than {MOST_VALUES:,} values"),
        ("x: &a [*a]", "an alias stands inside the value that it means"),
        ("[" * 100_000, "nest too deeply"),
        ("a: " + "[" * 5000 + "]" * 5000, "nest too deeply"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: 2020-13-45", "month"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("a: !!python/object:os.system x", "python/object"),
        ("a: [1,", "line 1"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError):
        read_yaml(file)


def test_aliases_within_bounds_are_read():
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: *x") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}
