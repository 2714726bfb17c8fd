//! Numbers as people list them: `0-3+8`.

/// No list of vCPUs, host CPUs or nodes is longer.
const LIST_MAX: usize = 8192;

/// Ascending, each once.
pub fn list(text: &str) -> Result<Vec<u32>, String> {
    let wrong = || format!("{text:?} is no list of numbers; write 3, 0-3 or 0-3+8");
    let mut all = std::collections::BTreeSet::new();
    for part in text.split('+') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let from: u32 = from.trim().parse().map_err(|_| wrong())?;
        let to: u32 = to.trim().parse().map_err(|_| wrong())?;
        if from > to || (to - from) as usize >= LIST_MAX {
            return Err(wrong());
        }
        all.extend(from..=to);
    }
    if all.len() > LIST_MAX { Err(wrong()) } else { Ok(all.into_iter().collect()) }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(list("3"), Ok(vec![3]));
        assert_eq!(list("8+0-3+2"), Ok(vec![0, 1, 2, 3, 8]));
        for text in ["", "+", "a", "3-1", "-1", "0-", "0-4294967295", "1,2", "0--3"] {
            assert!(list(text).is_err(), "{text}");
        }
    }
}
