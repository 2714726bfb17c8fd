//! Debian control data: paragraphs of `Field: value` lines (deb822(5)).
//!
//! Everything borrows from the text: an index of 60,000 packages is scanned without copying it.

/// One paragraph. Fields are found by scanning, since few of them are ever asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paragraph<'a> {
    text: &'a str,
}

impl<'a> Paragraph<'a> {
    /// Takes `text` as one paragraph; blank lines in it end nothing.
    pub fn new(text: &'a str) -> Self {
        Paragraph { text }
    }

    /// The paragraph as it stands, without the blank line that ends it.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// The fields in order: name and raw value (continuation lines kept, outer white space trimmed).
    pub fn fields(&self) -> Fields<'a> {
        Fields { rest: self.text }
    }

    /// The value of the first field called `name`, compared without case.
    pub fn field(&self, name: &str) -> Option<&'a str> {
        self.fields().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Iterator over the fields of a paragraph.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (line, mut rest) = split_line(self.rest)?;
            let start = self.rest;
            let mut length = line.len();
            while rest.starts_with([' ', '\t']) {
                let Some((continuation, after)) = split_line(rest) else { break };
                // The newline between the lines belongs to the value.
                length = length.saturating_add(continuation.len()).saturating_add(1);
                rest = after;
            }
            self.rest = rest;
            if line.starts_with('#') {
                continue;
            }
            let whole = start.get(..length).unwrap_or(line);
            if let Some((name, value)) = whole.split_once(':') {
                return Some((name.trim_end(), value.trim()));
            }
        }
    }
}

fn split_line(text: &str) -> Option<(&str, &str)> {
    if text.is_empty() {
        return None;
    }
    Some(text.split_once('\n').unwrap_or((text, "")))
}

/// The paragraphs of a control file.
pub fn paragraphs(text: &str) -> Paragraphs<'_> {
    Paragraphs { rest: text }
}

/// Iterator over the paragraphs of a control file.
#[derive(Clone, Debug)]
pub struct Paragraphs<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Paragraphs<'a> {
    type Item = Paragraph<'a>;

    fn next(&mut self) -> Option<Paragraph<'a>> {
        self.rest = self.rest.trim_start_matches(['\n', '\r']);
        if self.rest.is_empty() {
            return None;
        }
        let (text, rest) = self.rest.split_once("\n\n").unwrap_or((self.rest, ""));
        self.rest = rest;
        Some(Paragraph { text })
    }
}

/// True for a package name by Debian Policy 5.6.7, so that it is safe as part of a file name.
pub fn is_package_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() >= 2
        && name.len() <= 128
        && bytes.next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte))
}

/// True for a version by Debian Policy 5.6.12, so that it is safe as part of a file name.
pub fn is_version(version: &str) -> bool {
    !version.is_empty()
        && version.len() <= 128
        && version.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".+-:~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_paragraphs_and_folded_fields() {
        let text = "Package: a\nDescription: one\n two\n .\nVersion: 1\n\n\n# note\nPackage: b\n";
        let all: Vec<_> = paragraphs(text).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].field("description"), Some("one\n two\n ."));
        assert_eq!(all[0].field("Version"), Some("1"));
        assert_eq!(all[1].field("Package"), Some("b"));
        assert_eq!(all[1].field("Version"), None);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        for bad in ["", "a", "../x", "a/b", "A", "-a", "a b", "a\n"] {
            assert!(!is_package_name(bad), "{bad:?}");
        }
        assert!(is_package_name("libstdc++6") && is_package_name("0ad"));
        assert!(!is_version("1/2") && !is_version("1 2") && is_version("1:2.3~rc1+b1-4"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[ab:#. \\n\\t\u{e9}]{0,64}") {
            let fields = paragraphs(&text).flat_map(|paragraph| paragraph.fields()).count();
            prop_assert!(fields <= text.lines().count());
        }
    }
}
