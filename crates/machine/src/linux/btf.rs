//! BTF, the kernel's description of its own types (Linux `Documentation/bpf/btf.rst`): where a member of a struct is.

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// Bytes that follow the twelve of a type of this kind with so many members.
fn tail(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        2 | 7..=12 | 16 | 18 => 0,
        1 | 14 | 17 => 4,
        3 => 12,
        STRUCT | 5 | 15 | 19 => members.checked_mul(12)?,
        6 | 13 => members.checked_mul(8)?,
        _ => return None,
    })
}

fn is_named(strings: &[u8], at: u32, name: &str) -> bool {
    let text = usize::try_from(at).ok().and_then(|at| strings.get(at..));
    text.and_then(|text| text.strip_prefix(name.as_bytes())).is_some_and(|rest| rest.first() == Some(&0))
}

/// The offset in bytes of a direct member of the struct with this name.
pub(super) fn member(btf: &[u8], structure: &str, member: &str) -> Option<u64> {
    if btf.get(..2)? != MAGIC.to_le_bytes() {
        return None;
    }
    let section = |offset: usize, length: usize| {
        let start = word(btf, 4)?.checked_add(word(btf, offset)?)?;
        let end = start.checked_add(word(btf, length)?)?;
        btf.get(start as usize..end as usize)
    };
    let (types, strings) = (section(8, 12)?, section(16, 20)?);
    let mut at = 0usize;
    // Every type is at least twelve bytes long.
    while let Some(name) = word(types, at) {
        let info = word(types, at.checked_add(4)?)?;
        let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let first = at.checked_add(12)?;
        let end = first.checked_add(tail(kind, members)?)?;
        if kind == STRUCT && is_named(strings, name, structure) {
            let fields = types.get(first..end)?;
            let field = fields
                .chunks_exact(12)
                .find(|field| word(field, 0).is_some_and(|name| is_named(strings, name, member)))?;
            // With the flag set the upper byte is the width of a bit field.
            let bits = word(field, 8)? & if info >> 31 != 0 { 0xff_ffff } else { u32::MAX };
            return Some(u64::from(bits / 8));
        }
        at = end;
    }
    None
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// An integer, and a struct of two members.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0task_struct\0tgid\0comm\0";
        let types: Vec<u8> = [
            1,
            1 << 24,
            4,
            32, // int, 32 bits
            5,
            STRUCT << 24 | 2,
            64, // task_struct with two members
            17,
            1,
            1024, // tgid
            22,
            1,
            2048 | 7 << 24, // comm
        ]
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect();
        let mut btf = MAGIC.to_le_bytes().to_vec();
        btf.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            btf.extend(word.to_le_bytes());
        }
        [btf, types, strings.to_vec()].concat()
    }

    #[test]
    fn members_are_found_by_name() {
        let mut btf = sample();
        assert_eq!(member(&btf, "task_struct", "tgid"), Some(128));
        assert_eq!(member(&btf, "task_struct", "pid"), None);
        assert_eq!(member(&btf, "task", "tgid"), None);
        // The flag of bit fields.
        btf[24 + 16 + 7] |= 0x80;
        assert_eq!(member(&btf, "task_struct", "comm"), Some(256));
    }

    proptest! {
        #[test]
        fn broken_descriptions_are_no_harm(at in 0usize..100, byte: u8, cut in 0usize..120) {
            let mut btf = sample();
            if let Some(place) = btf.get_mut(at) {
                *place = byte;
            }
            btf.truncate(cut);
            member(&btf, "task_struct", "comm");
        }
    }
}
