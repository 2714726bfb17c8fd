//! The kernel's own table of its symbols, found in an image of the running kernel (Linux `kernel/kallsyms.c`,
//! `scripts/kallsyms.c`).
//!
//! Names are strings of one-byte tokens; a table says what each token stands for, and an index where in the table each
//! token begins. The index confirms the table, which is found by the digits that stand for themselves. Every 256th name
//! has a marker; markers lie before the tokens, names and their number before those. Addresses are 32-bit offsets from
//! a base: before the names up to Linux 6.3, behind the tokens later.

/// Tables that are looked at before it is given up: a real kernel's is found after some hundred, and a guest can put what looks like the
/// beginning of one everywhere.
const TABLES_MAX: u32 = 1 << 14;
/// What a search for the names costs, in tables.
const NAMES_COST: u32 = 1 << 10;

/// What digits look like in the table of tokens.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
const TOKENS: usize = 256;
/// No kernel has more symbols.
const SYMBOLS_MAX: usize = 1 << 20;
/// Names per marker.
const STRIDE: usize = 256;
/// The longest name, in tokens, and the longest expanded one in bytes (`KSYM_NAME_LEN`).
const NAME_MAX: usize = 512;

/// Function names by address, and the few other symbols that [`super`] asks for.
#[derive(Debug)]
pub(super) struct Symbols {
    /// Sorted: address, place of the name in `text`.
    functions: Vec<(u64, u32)>,
    /// Names, each ended by a zero.
    text: String,
    others: Vec<(&'static str, u64)>,
}

/// Symbols of other kinds that are kept.
const KEPT: [&str; 4] = ["__start_BTF", "__stop_BTF", "current_task", "pcpu_hot"];

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Where each token begins in the image.
struct Tokens {
    table: usize,
    starts: Vec<usize>,
    /// What follows the index.
    end: usize,
}

impl Tokens {
    /// Takes the digits at `digits` for those of a table.
    fn around(image: &[u8], digits: usize, left: &mut u32) -> Option<Self> {
        // Forty-eight tokens stand before the digits.
        let (mut zeroes, mut table) = (0usize, digits);
        while zeroes < 48 {
            table = table.checked_sub(1)?;
            if digits.wrapping_sub(table) > 48 * NAME_MAX {
                return None;
            }
            zeroes = zeroes.wrapping_add(usize::from(image.get(table) == Some(&0)));
        }
        // The first token begins somewhere before the end that was just met.
        loop {
            if table & 7 == 0 {
                *left = left.checked_sub(1)?;
                if let Some(tokens) = Self::at(image, table) {
                    return Some(tokens);
                }
            }
            table = table.checked_sub(1)?;
            if image.get(table) == Some(&0) && image.get(table.checked_sub(1)?) == Some(&0) {
                // Padding: the table may still begin right behind it, which was looked at.
                return None;
            }
            if digits.wrapping_sub(table) > 49 * NAME_MAX {
                return None;
            }
        }
    }

    fn at(image: &[u8], table: usize) -> Option<Self> {
        let mut starts = Vec::with_capacity(TOKENS);
        let mut at = table;
        for _ in 0..TOKENS {
            starts.push(at);
            let length = image.get(at..at.checked_add(NAME_MAX)?)?.iter().position(|&byte| byte == 0)?;
            at = at.checked_add(length)?.checked_add(1)?;
        }
        let index = at.checked_next_multiple_of(8)?;
        let agrees = starts.iter().enumerate().all(|(number, start)| {
            let entry = number.checked_mul(2).and_then(|offset| index.checked_add(offset));
            let entry = entry.and_then(|entry| image.get(entry..entry.checked_add(2)?));
            entry.is_some_and(|entry| entry == (start.wrapping_sub(table) as u16).to_le_bytes())
        });
        agrees.then(|| Self { table, starts, end: index.wrapping_add(TOKENS * 2) })
    }

    fn text<'a>(&self, image: &'a [u8], token: u8) -> &'a [u8] {
        let rest = self.starts.get(usize::from(token)).and_then(|&start| image.get(start..));
        rest.and_then(|rest| rest.split(|&byte| byte == 0).next()).unwrap_or_default()
    }
}

/// One name's tokens, and where the next begins.
fn name_at(image: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let mut start = at.checked_add(1)?;
    let mut length = usize::from(*image.get(at)?);
    if length & 0x80 != 0 {
        // Two bytes, the lower seven bits first.
        length = length & 0x7f | usize::from(*image.get(start)?) << 7;
        start = start.checked_add(1)?;
    }
    let end = start.checked_add(length).filter(|_| length > 0 && length <= NAME_MAX)?;
    Some((image.get(start..end)?, end))
}

/// Where the names begin, and how many there are.
fn names(image: &[u8], table: usize) -> Option<(usize, usize)> {
    // Markers ascend from zero up to the table.
    let mut first = table.checked_sub(4)?;
    if u32_at(image, first)? == 0 {
        // Padding.
        first = first.checked_sub(4)?;
    }
    let last = u32_at(image, first)?;
    let mut markers = 1usize;
    while u32_at(image, first)? != 0 {
        let before = first.checked_sub(4)?;
        if u32_at(image, before)? >= u32_at(image, first)? || markers > SYMBOLS_MAX / STRIDE {
            return None;
        }
        (first, markers) = (before, markers.checked_add(1)?);
    }
    let second = u32_at(image, first.checked_add(4)?)?;
    let latest = first.checked_sub(last as usize)? & !7;
    // At most one stride of names follows the last marker.
    for step in 0..STRIDE.checked_mul(NAME_MAX)?.checked_div(8)? {
        let start = latest.checked_sub(step.checked_mul(8)?)?;
        let count = u32_at(image, start.checked_sub(8)?)? as usize;
        if count.div_ceil(STRIDE) == markers && second == stride_length(image, start).unwrap_or(0) {
            return Some((start, count));
        }
    }
    None
}

/// The length in bytes of the first 256 names.
fn stride_length(image: &[u8], start: usize) -> Option<u32> {
    let mut at = start;
    for _ in 0..STRIDE {
        at = name_at(image, at)?.1;
    }
    u32::try_from(at.checked_sub(start)?).ok()
}

/// Where the offsets are, and their base.
fn offsets(image: &[u8], names: usize, count: usize, after: usize) -> Option<(usize, u64)> {
    let length = count.checked_mul(4)?.checked_next_multiple_of(8)?;
    let after = after.checked_next_multiple_of(8)?;
    let before = names.checked_sub(16)?.checked_sub(length);
    let candidates = [(Some(after), after.checked_add(length)?), (before, names.checked_sub(16)?)];
    let is_base = |base: &u64| super::KERNEL.contains(base) && base & 0xfff == 0;
    candidates.into_iter().find_map(|(start, base)| Some((start?, u64_at(image, base).filter(is_base)?)))
}

impl Symbols {
    /// Finds the table in what is mapped at `base`.
    pub(super) fn find(base: u64, image: &[u8]) -> Option<Self> {
        let (mut from, mut left) = (0, TABLES_MAX);
        while let Some(at) = position(image, from) {
            if let Some(tokens) = Tokens::around(image, at, &mut left) {
                left = left.checked_sub(NAMES_COST)?;
                if let Some(symbols) = Self::read(base, image, &tokens) {
                    return Some(symbols);
                }
            }
            // What looks for the table's beginning goes over as much of the image, too.
            left = left.checked_sub(1)?;
            from = at.checked_add(1)?;
        }
        None
    }

    fn read(image_base: u64, image: &[u8], tokens: &Tokens) -> Option<Self> {
        let (names, count) = names(image, tokens.table)?;
        let (offsets, base) = offsets(image, names, count, tokens.end)?;
        let end = image_base.checked_add(image.len() as u64)?;
        let offset = |number: usize| u32_at(image, offsets.checked_add(number.checked_mul(4)?)?);
        // With absolute per-CPU symbols, those that are not absolute have negative offsets.
        let signed = (0..count).any(|number| offset(number).is_some_and(|offset| offset >> 31 != 0));
        let mut symbols = Self { functions: Vec::new(), text: String::new(), others: Vec::new() };
        let mut at = names;
        let mut name = Vec::new();
        for number in 0..count {
            let (parts, next) = name_at(image, at)?;
            at = next;
            name.clear();
            for &token in parts {
                name.extend_from_slice(tokens.text(image, token));
                if name.len() > NAME_MAX {
                    return None;
                }
            }
            let offset = offset(number)?;
            let address = match signed {
                true if offset >> 31 != 0 => base.wrapping_sub(1).wrapping_sub(offset as i32 as i64 as u64),
                true => u64::from(offset),
                false => base.wrapping_add(u64::from(offset)),
            };
            let (kind, name) = name.split_first()?;
            symbols.add(*kind, std::str::from_utf8(name).ok()?, address, end);
        }
        symbols.functions.sort_by_key(|&(address, _)| address);
        (!symbols.functions.is_empty()).then_some(symbols)
    }

    fn add(&mut self, kind: u8, name: &str, address: u64, end: u64) {
        if let Some(kept) = KEPT.into_iter().find(|kept| *kept == name) {
            self.others.push((kept, address));
        }
        if matches!(kind, b't' | b'T' | b'w' | b'W')
            && (super::KERNEL.start..end).contains(&address)
            && let Ok(place) = u32::try_from(self.text.len())
        {
            self.functions.push((address, place));
            self.text.extend(name.chars().map(|c| if c.is_control() { '?' } else { c }));
            self.text.push('\0');
        }
    }

    /// How many functions there are.
    pub(super) fn functions(&self) -> usize {
        self.functions.len()
    }

    /// The function that an address is in.
    pub(super) fn function(&self, address: u64) -> Option<&str> {
        let after = self.functions.partition_point(|&(start, _)| start <= address);
        let &(_, place) = self.functions.get(after.checked_sub(1)?)?;
        self.text.get(place as usize..)?.split('\0').next()
    }

    /// The address of one of the other symbols.
    pub(super) fn other(&self, name: &str) -> Option<u64> {
        self.others.iter().find(|(other, _)| *other == name).map(|&(_, address)| address)
    }
}

/// The next place where the digits are.
fn position(image: &[u8], from: usize) -> Option<usize> {
    let place = image.get(from..)?.windows(DIGITS.len()).position(|window| window == DIGITS)?;
    from.checked_add(place)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = 0xffff_ffff_8120_0000;

    /// What a kernel's build makes of symbols: address (or a per-CPU offset) and name with its kind, in order. Tokens stand
    /// for themselves but two.
    fn image(symbols: &[(u64, String)], late: bool) -> Vec<u8> {
        let mut names = Vec::new();
        let mut markers = Vec::new();
        for (number, (_, name)) in symbols.iter().enumerate() {
            if number % STRIDE == 0 {
                markers.extend((names.len() as u32).to_le_bytes());
            }
            let tokens: Vec<u8> = name
                .replace("sys_", "\u{1}")
                .bytes()
                .map(|byte| if byte == b'@' { 2 } else { byte })
                .collect();
            match tokens.len() {
                length @ 0..0x80 => names.push(length as u8),
                length => names.extend([length as u8 & 0x7f | 0x80, (length >> 7) as u8]),
            }
            names.extend(tokens);
        }
        let (mut table, mut index) = (Vec::new(), Vec::new());
        for token in 0..=255u8 {
            index.extend((table.len() as u16).to_le_bytes());
            match token {
                1 => table.extend(b"sys_"),
                2 => table.extend(b"long_part_of_a_name"),
                b'!'..=b'~' => table.push(token),
                _ => table.extend(b"unused"),
            }
            table.push(0);
        }
        let offsets: Vec<u8> = symbols
            .iter()
            .map(|&(address, _)| {
                if address < 1 << 30 {
                    address as u32
                } else {
                    BASE.wrapping_sub(1).wrapping_sub(address) as u32
                }
            })
            .flat_map(u32::to_le_bytes)
            .collect();
        let mut image = vec![0xcc; 4096];
        let mut put = |part: &[u8]| {
            image.resize(image.len().next_multiple_of(8), 0);
            image.extend_from_slice(part);
        };
        if !late {
            put(&offsets);
            put(&BASE.to_le_bytes());
        }
        put(&(symbols.len() as u32).to_le_bytes());
        for part in [&names, &markers, &table, &index] {
            put(part);
        }
        if late {
            put(&offsets);
            put(&BASE.to_le_bytes());
        }
        image.resize(1 << 20, 0xcc);
        image
    }

    fn symbols() -> Vec<(u64, String)> {
        let mut symbols: Vec<_> = (0..1000u64)
            .map(|i| (BASE + i * 64, format!("tfunction_{i}_sys_{}", "@".repeat(i as usize % 9))))
            .collect();
        symbols[3].1 = format!("T{}", "x".repeat(200));
        symbols.insert(0, (0x1f5c0, "Dpcpu_hot".into()));
        symbols.push((BASE + 99_000, "D__start_BTF".into()));
        symbols
    }

    #[test]
    fn both_orders_are_read() {
        for late in [false, true] {
            let found = Symbols::find(BASE, &image(&symbols(), late)).unwrap();
            assert_eq!(found.functions(), 1000);
            assert_eq!(
                found.function(BASE + 64 * 20 + 5),
                Some("function_20_sys_long_part_of_a_namelong_part_of_a_name")
            );
            assert_eq!(found.function(BASE + 64 * 3).unwrap().len(), 200);
            assert_eq!(found.function(BASE - 1), None);
            assert_eq!(found.other("pcpu_hot"), Some(0x1f5c0));
            assert_eq!(found.other("__start_BTF"), Some(BASE + 99_000));
            assert_eq!(found.other("current_task"), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn broken_tables_are_no_harm(late: bool, wounds in proptest::collection::vec((4096usize..60_000, any::<u8>()), 1..20)) {
            let mut image = image(&symbols(), late);
            for (at, byte) in wounds {
                image[at] = byte;
            }
            image.truncate(100_000);
            let _ = Symbols::find(BASE, &image);
        }
    }

    #[test]
    fn what_looks_like_a_table_everywhere_does_not_keep_us() {
        let began = std::time::Instant::now();
        assert!(Symbols::find(BASE, &DIGITS.repeat(1 << 18)).is_none());
        assert!(began.elapsed() < std::time::Duration::from_secs(10));
    }
}
