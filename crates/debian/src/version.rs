//! Debian package versions and their order (Debian Policy 5.6.12, deb-version(7)).

use std::cmp::Ordering;

/// Compares two version strings as dpkg does.
///
/// Total over any input: strings that are no valid versions still get a stable order.
pub fn compare(left: &str, right: &str) -> Ordering {
    let (left_epoch, left) = split_epoch(left);
    let (right_epoch, right) = split_epoch(right);
    let (left_upstream, left_revision) = split_revision(left);
    let (right_upstream, right_revision) = split_revision(right);
    compare_number(left_epoch.as_bytes(), right_epoch.as_bytes())
        .then_with(|| compare_part(left_upstream, right_upstream))
        .then_with(|| compare_part(left_revision, right_revision))
}

fn split_epoch(version: &str) -> (&str, &str) {
    version.split_once(':').unwrap_or(("", version))
}

fn split_revision(version: &str) -> (&str, &str) {
    version.rsplit_once('-').unwrap_or((version, ""))
}

/// Weight of a character that is no digit: `~` sorts before the end, letters before the rest.
fn weight(byte: Option<u8>) -> i32 {
    match byte {
        None => 0,
        Some(b'~') => -1,
        Some(byte) if byte.is_ascii_digit() => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(byte),
        Some(byte) => i32::from(byte).saturating_add(256),
    }
}

/// Compares runs of non-digits and runs of digits in turn.
fn compare_part(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    while !left.is_empty() || !right.is_empty() {
        let (left_text, left_rest) = take_while(left, |byte| !byte.is_ascii_digit());
        let (right_text, right_rest) = take_while(right, |byte| !byte.is_ascii_digit());
        for place in 0..left_text.len().max(right_text.len()) {
            let order = weight(left_text.get(place).copied()).cmp(&weight(right_text.get(place).copied()));
            if order != Ordering::Equal {
                return order;
            }
        }
        let (left_number, left_rest) = take_while(left_rest, |byte| byte.is_ascii_digit());
        let (right_number, right_rest) = take_while(right_rest, |byte| byte.is_ascii_digit());
        let order = compare_number(left_number, right_number);
        if order != Ordering::Equal {
            return order;
        }
        (left, right) = (left_rest, right_rest);
    }
    Ordering::Equal
}

fn take_while(bytes: &[u8], accept: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    let length = bytes.iter().take_while(|byte| accept(byte)).count();
    bytes.split_at_checked(length).unwrap_or((bytes, &[]))
}

/// Compares decimal digit strings of any length; empty counts as zero.
fn compare_number(left: &[u8], right: &[u8]) -> Ordering {
    let (_, left) = take_while(left, |byte| *byte == b'0');
    let (_, right) = take_while(right, |byte| *byte == b'0');
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use std::process::Command;

    #[test]
    fn known_orders() {
        let ascending = [
            "1.0~beta1~svc",
            "1.0~beta1",
            "1.0",
            "1.0-0.1",
            "1.0-1~bpo1",
            "1.0-1",
            "1.0-1+b1",
            "1.0a",
            "1.0+dfsg-1",
            "1.2",
            "1.10",
            "1:0.1",
            "2:0",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{} < {}", pair[0], pair[1]);
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater);
        }
        assert_eq!(compare("1.0-0", "1.0"), Ordering::Equal);
        assert_eq!(compare("0:1.0", "1.00"), Ordering::Equal);
    }

    /// dpkg itself as the oracle, in one shell for all pairs because a process per pair would take long.
    #[test]
    fn agrees_with_dpkg() {
        if Command::new("dpkg").arg("--version").output().is_err() {
            return; // Not a Debian host: the fixed orders above still hold the line.
        }
        let strategy = "([0-9]{1,2}:)?[0-9][0-9a-c.+~]{0,6}(-[0-9a-c.+~]{1,4})?";
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let generator = proptest::string::string_regex(strategy).unwrap();
        let mut draw = || generator.new_tree(&mut runner).unwrap().current();
        let pairs: Vec<(String, String)> = (0..300).map(|_| (draw(), draw())).collect();
        let script: String = pairs
            .iter()
            .map(|(a, b)| {
                format!("dpkg --compare-versions '{a}' lt '{b}' && echo L || {{ dpkg --compare-versions '{a}' eq '{b}' && echo E || echo G; }}\n")
            })
            .collect();
        let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
        let verdicts = String::from_utf8(output.stdout).unwrap();
        assert_eq!(verdicts.lines().count(), pairs.len());
        for ((a, b), verdict) in pairs.iter().zip(verdicts.lines()) {
            let want = match verdict {
                "L" => Ordering::Less,
                "E" => Ordering::Equal,
                _ => Ordering::Greater,
            };
            assert_eq!(compare(a, b), want, "{a} against {b}");
        }
    }

    proptest! {
        #[test]
        fn is_an_order(a in "\\PC{0,8}", b in "\\PC{0,8}", c in "\\PC{0,8}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b) == Ordering::Less && compare(&b, &c) == Ordering::Less {
                prop_assert_eq!(compare(&a, &c), Ordering::Less);
            }
        }
    }
}
