//! Dates of Release files (RFC 2822 form, always UTC): `Sat, 12 Sep 2026 07:55:41 UTC`.

use std::time::{Duration, SystemTime};

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Parses a date of a Release file; `None` if it is none, or not in UTC.
pub fn parse(text: &str) -> Option<SystemTime> {
    let text = text.split_once(',').map_or(text, |(_, rest)| rest);
    let mut words = text.split_whitespace();
    let day: u64 = words.next()?.parse().ok().filter(|day| (1..=31).contains(day))?;
    let month = words.next()?;
    let month = u64::try_from(MONTHS.iter().position(|name| *name == month)?).ok()?;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..=9999).contains(year))?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if !matches!(words.next()?, "UTC" | "GMT" | "+0000" | "Z") || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = days_since_epoch(year, month.checked_add(1)?, day)?
        .checked_mul(24)?
        .checked_add(hour)?
        .checked_mul(60)?
        .checked_add(minute)?
        .checked_mul(60)?
        .checked_add(second)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Days from 1970-01-01 to a date of the Gregorian calendar; the year is counted from March so that leap days come last.
fn days_since_epoch(year: u64, month: u64, day: u64) -> Option<u64> {
    let (year, month) =
        if month > 2 { (year, month.checked_sub(3)?) } else { (year.checked_sub(1)?, month.checked_add(9)?) };
    let leap_days = (year / 4).checked_sub(year / 100)?.checked_add(year / 400)?;
    let days_of_months = month.checked_mul(153)?.checked_add(2)? / 5;
    year.checked_mul(365)?
        .checked_add(leap_days)?
        .checked_add(days_of_months)?
        .checked_add(day)?
        // 1970-01-01 counted this way.
        .checked_sub(719_469)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let seconds = |text| parse(text).unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(seconds("Thu, 01 Jan 1970 00:00:00 UTC"), 0);
        assert_eq!(seconds("Sat, 12 Sep 2026 07:55:41 UTC"), 1_789_199_741);
        assert_eq!(seconds("Thu, 29 Feb 2024 23:59:59 UTC"), 1_709_251_199);
        assert_eq!(seconds("Wed, 01 Jan 2025 00:00:00 +0000"), 1_735_689_600);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "Sat, 12 Sep 2026",
            "Sat, 12 Foo 2026 07:55:41 UTC",
            "Sat, 12 Sep 99999 07:55:41 UTC",
            "Sat, 12 Sep 2026 7:5 UTC",
            "Sat, 12 Sep 2026 07:55:41 EST",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
