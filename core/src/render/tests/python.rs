//! What Python prints: vectors from CPython 3.11.

use super::*;
use crate::render::{clock, environment, python, value};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn evaluate(template: &str, context: &str) -> Result<String, Error> {
    let env = environment::environment()?;
    env.render_str(template, value::Builder::new().json(RawJson::parse(context).unwrap()).unwrap())
}

#[test]
fn floats_print_as_python_repr() {
    for (value, expected) in [
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1.0, "1.0"),
        (3.0, "3.0"),
        (0.1, "0.1"),
        (-2.5, "-2.5"),
        (100.0, "100.0"),
        (123_456.789, "123456.789"),
        (1e15, "1000000000000000.0"),
        (9_999_999_999_999_998.0, "9999999999999998.0"),
        (1e16, "1e+16"),
        (1.5e16, "1.5e+16"),
        (1e22, "1e+22"),
        (1e100, "1e+100"),
        (0.0001, "0.0001"),
        (0.000_123, "0.000123"),
        (0.000_01, "1e-05"),
        (1.5e-7, "1.5e-07"),
        (5e-324, "5e-324"),
        (f64::MAX, "1.7976931348623157e+308"),
        (2_f64.powi(-44), "5.684341886080802e-14"),
        (0.1 + 0.2, "0.30000000000000004"),
        (9_007_199_254_740_993.0, "9007199254740992.0"),
        (f64::INFINITY, "inf"),
        (f64::NEG_INFINITY, "-inf"),
        (f64::NAN, "nan"),
    ] {
        assert_eq!(python::float(value), expected);
    }
}

#[test]
fn values_print_as_in_python() {
    let context = r#"{"v": {"b": [1, 2.0, null, true, "it's", "q\"", "'\"", "\n\u00e9\u200b\u0000\ue000\ud83d\ude00"], "a": {}, "b2": []},
        "big": 123456789012345678901234567890123456789012345678901, "wide": 18446744073709551616,
        "dup": {"x": 1, "y": 2, "x": 3}}"#;
    let dict = r#"{'b': [1, 2.0, None, True, "it's", 'q"', '\'"', '\né\u200b\x00\ue000😀'], 'a': {}, 'b2': []}"#;
    for (template, expected) in [
        ("{{ v }}", dict),
        ("{{ v|string }}", dict),
        ("{{ '' ~ v }}", dict),
        ("{{ v.b|join('|') }}", "1|2.0|None|True|it's|q\"|'\"|\né\u{200b}\0\u{e000}😀"),
        (
            "{{ big }} {{ wide }} {{ big|tojson }}",
            "123456789012345678901234567890123456789012345678901 18446744073709551616 123456789012345678901234567890123456789012345678901",
        ),
        ("{{ dup }}", "{'x': 3, 'y': 2}"),
        ("{{ (1, 'a') }} {{ (1,) }} {{ v.b[:2] }}", "(1, 'a') (1,) [1, 2.0]"),
        ("{{ none }} {{ true }} {{ undefined_name }}|", "None True |"),
        ("{{ {'k': 1.5, 'a': [none]} }}", "{'k': 1.5, 'a': [None]}"),
    ] {
        assert_eq!(evaluate(template, context).unwrap(), expected, "{template}");
    }
}

#[test]
fn tojson_prints_as_json_dumps() {
    let context =
        r#"{"v": {"b": [1, 1e22, 1e-7, {}, [], null], "a": "é\u0001\u007f</script>😀\b\f"}}"#;
    for (template, expected) in [
        (
            "{{ v|tojson }}",
            "{\"b\": [1, 1e+22, 1e-07, {}, [], null], \"a\": \"é\\u0001\u{7f}</script>😀\\b\\f\"}",
        ),
        ("{{ v.a|tojson(ensure_ascii=True) }}", r#""\u00e9\u0001\u007f</script>\ud83d\ude00\b\f""#),
        ("{{ v.b|tojson(indent=2) }}", "[\n  1,\n  1e+22,\n  1e-07,\n  {},\n  [],\n  null\n]"),
        ("{{ {'x': [1]}|tojson(indent='\t') }}", "{\n\t\"x\": [\n\t\t1\n\t]\n}"),
        ("{{ {'x': [1, 2]}|tojson(separators=(',', ':')) }}", r#"{"x":[1,2]}"#),
        (
            r#"{{ {"b": {"d": 1, "c": 2}, "a": 3}|tojson(sort_keys=true) }}"#,
            r#"{"a": 3, "b": {"c": 2, "d": 1}}"#,
        ),
        ("{{ {'b': 1, 'a': 2, 3: none}|tojson }}", r#"{"b": 1, "a": 2, "3": null}"#),
        ("{{ v.b[1:3]|tojson }}", "[1e+22, 1e-07]"),
        ("{{ [1]|tojson(false, 0) }}", "[\n1\n]"),
    ] {
        assert_eq!(evaluate(template, context).unwrap(), expected, "{template}");
    }
    for template in [
        "{{ nothing|tojson }}",
        "{{ [range]|tojson }}",
        "{{ v|tojson(colour=1) }}",
        "{{ v|tojson(indent=1000) }}",
    ] {
        assert!(evaluate(template, context).is_err(), "{template}");
    }
}

#[test]
fn tests_and_methods_follow_python() {
    let context = r#"{"l": [], "d": {"items": 1, "a": 2}, "s": "\u001c x\u00a0\u001f", "n": null, "i": 1, "t": true}"#;
    for (template, expected) in [
        (
            "{{ l is iterable }} {{ d is iterable }} {{ s is iterable }} {{ n is iterable }} {{ i is iterable }} {{ u is iterable }}",
            "True True True False False True",
        ),
        (
            "{{ l is sequence }} {{ d is sequence }} {{ s is sequence }} {{ n is sequence }} {{ l[1:] is sequence }}",
            "True True True False True",
        ),
        ("{{ t is number }} {{ i is number }} {{ s is number }}", "True True False"),
        ("{{ d is mapping }} {{ l is mapping }}", "True False"),
        ("[{{ s.strip() }}] [{{ s|trim }}] [{{ s.lstrip() }}]", "[x] [x] [x\u{a0}\u{1f}]"),
        (
            "{{ 'abcab'.strip('ab') }} {{ 'ab'.removeprefix('a') }} {{ 'ab'.removesuffix('b') }}",
            "c b a",
        ),
        ("{% for k, v in d.items() %}{{ k }}={{ v }} {% endfor %}", "items=1 a=2 "),
        ("{{ d.get('a') }} {{ d.get('z', 5) }} {{ 'a' in d }} {{ d|length }}", "2 5 True 2"),
        ("{% for x in [1,2,3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
    ] {
        assert_eq!(evaluate(template, context).unwrap(), expected, "{template}");
    }
}

#[test]
fn strftime_follows_glibc() {
    let format =
        "%Y-%m-%d %H:%M:%S %y %B %b %A %a %j %I %p %e %-d %-m %% %F %T %D %c %u %w %C %R%z%Z";
    for (now, expected) in [
        (
            NOW,
            "2024-07-26 13:05:09 24 July Jul Friday Fri 208 01 PM 26 26 7 % 2024-07-26 13:05:09 07/26/24 Fri Jul 26 13:05:09 2024 5 5 20 13:05",
        ),
        (
            WallClock { unix_seconds: 951_782_400, utc_offset_seconds: -1 },
            "2000-02-28 23:59:59 00 February Feb Monday Mon 059 11 PM 28 28 2 % 2000-02-28 23:59:59 02/28/00 Mon Feb 28 23:59:59 2000 1 1 20 23:59",
        ),
        (
            WallClock { unix_seconds: 1_735_603_200, utc_offset_seconds: 3_600 },
            "2024-12-31 01:00:00 24 December Dec Tuesday Tue 366 01 AM 31 31 12 % 2024-12-31 01:00:00 12/31/24 Tue Dec 31 01:00:00 2024 2 2 20 01:00",
        ),
    ] {
        assert_eq!(clock::strftime(now, format).unwrap(), expected);
    }
    assert!(clock::strftime(NOW, "%Q").is_err());
    assert!(clock::strftime(NOW, "%").is_err());
}
