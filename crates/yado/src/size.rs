//! Sizes as people write them: `512M`, `4G`, `65536`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes; suffixes are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const SUFFIXES: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a size; write 512M or 4G");
        let trimmed = text.trim().trim_end_matches(['B', 'b']).trim_end_matches('i');
        let last = trimmed.chars().last().ok_or_else(wrong)?.to_ascii_uppercase();
        let (digits, shift) = match SUFFIXES.iter().find(|(suffix, _)| *suffix == last) {
            Some((_, shift)) => (trimmed.get(..trimmed.len() - 1).ok_or_else(wrong)?, *shift),
            None => (trimmed, 0),
        };
        // Up to three decimals, exactly: 1.5G.
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let whole: u64 = whole.parse().map_err(|_| wrong())?;
        let bytes = whole.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))?;
        if fraction.is_empty() {
            return Ok(Self(bytes));
        }
        let thousandths: u64 = format!("{fraction:0<3}").parse().map_err(|_| wrong())?;
        if fraction.len() > 3 || shift == 0 {
            return Err(wrong());
        }
        Ok(Self(bytes + ((u128::from(thousandths) << shift) / 1000) as u64))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, shift) in SUFFIXES.iter().rev() {
            let unit = 1u64 << shift;
            if self.0 >= unit {
                let tenths = (u128::from(self.0) * 10 / u128::from(unit)) as u64;
                return match tenths % 10 {
                    0 => write!(f, "{} {suffix}iB", tenths / 10),
                    tenth => write!(f, "{}.{tenth} {suffix}iB", tenths / 10),
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("512M", 512 << 20),
            ("4g", 4 << 30),
            ("1.5G", 3 << 29),
            ("64KiB", 65536),
            ("7TB", 7 << 40),
            ("1E", 1 << 60),
            ("15.5E", 31 << 59),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "16E", "-1", "1.2345G", "1.5", "99999999999T", "4 apples", "½G", "é"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(Size(512 << 20).to_string(), "512 MiB");
        assert_eq!(Size(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Size(100).to_string(), "100 B");
        assert_eq!(Size(u64::MAX).to_string(), "15.9 EiB");
    }
}
