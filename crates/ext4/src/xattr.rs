//! Extended attributes in the inode, behind its fixed fields (kernel docs: ext4/attributes).

use crate::error::{Error, Result, show};
use crate::record::Record;

const MAGIC: u32 = 0xea02_0000;
/// Bytes behind the 160 fixed ones of a 256-byte inode.
pub(crate) const SPACE: usize = 96;
/// What of it holds entries and values: all but the magic.
const BODY: usize = 92;
const ENTRY_HEADER: usize = 16;
const END_MARK: usize = 4;

/// Prefixes with the number that stands for them on disk. POSIX ACLs have a form of their own there and are left out.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// The bytes behind the fixed part of the inode; empty without attributes.
pub(crate) fn encode(attributes: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<u8>> {
    if attributes.is_empty() {
        return Ok(Vec::new());
    }
    let mut named = Vec::with_capacity(attributes.len());
    for (name, value) in attributes {
        let (index, rest) = split(name)?;
        named.push((index, rest.len(), rest, value, name));
    }
    named.sort();
    let mut entries = Record::new();
    let mut values: Vec<u8> = Vec::new();
    let mut previous = None;
    for (index, length, rest, value, name) in named {
        if previous == Some((index, rest)) {
            return Err(refused(name, "it is given twice"));
        }
        previous = Some((index, rest));
        let padded = value.len().next_multiple_of(4);
        let after = entries.len().saturating_add(ENTRY_HEADER).saturating_add(length.next_multiple_of(4));
        let used = after.saturating_add(END_MARK).saturating_add(values.len()).saturating_add(padded);
        if used > BODY {
            return Err(refused(name, "the attributes of the file need more than the 92 bytes in the inode"));
        }
        // Values grow down from the end; their offsets count from the first entry.
        let mut stored = value.clone();
        stored.resize(padded, 0);
        stored.append(&mut values);
        values = stored;
        let offset = BODY.saturating_sub(values.len()) as u16;
        entries.u8(length as u8).u8(index).u16(offset).u32(0);
        entries.u32(value.len() as u32).u32(0).bytes(rest).at(after);
    }
    let mut body = entries.take(BODY.saturating_sub(values.len()));
    body.append(&mut values);
    Ok(Record::new().u32(MAGIC).bytes(&body).take(SPACE))
}

fn split(name: &[u8]) -> Result<(u8, &[u8])> {
    let found = PREFIXES.iter().find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)));
    match found {
        None => Err(refused(name, "its prefix is none of user., trusted. and security.")),
        Some((_, [])) => Err(refused(name, "nothing follows its prefix")),
        Some((_, rest)) if rest.len() > 255 || rest.contains(&0) => {
            Err(refused(name, "its name is longer than 255 bytes or holds a NUL"))
        }
        Some(found) => Ok(found),
    }
}

fn refused(name: &[u8], why: &'static str) -> Error {
    Error::Xattr { name: show(name), why }
}
