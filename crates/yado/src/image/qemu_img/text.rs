//! Numbers and moments as qemu-img writes them.

use std::time::Duration;

/// Bytes with three digits: `1.25 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0usize;
    let mut value = bytes as f64;
    // From 1000 on the next larger unit is used.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// As C's `%0.3g` writes a number from 0 to 1024.
fn three_digits(value: f64) -> String {
    if value >= 999.5 {
        return format!("{:.2e}", value).replace(".00e", "e").replace("e3", "e+03");
    }
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else if value >= 0.9995 || value == 0.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Hours, minutes, seconds and milliseconds of a machine's clock.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:03}", seconds % 60, time.subsec_millis())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (10_514_432, "10 MiB"),
            (12_345_856, "11.8 MiB"),
            (1_310_720, "1.25 MiB"),
            (1_610_612_736, "1.5 GiB"),
            (1 << 40, "1 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn clocks_have_milliseconds() {
        assert_eq!(clock(Duration::from_millis(3_723_004)), "01:02:03.004");
    }
}
