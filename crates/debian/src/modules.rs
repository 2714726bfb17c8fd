//! The indices by which `modprobe` finds kernel modules, as depmod(8) makes them.
//!
//! A kernel package's script runs depmod; before that no module can be loaded, and a guest's network card, vsock or console may need one at
//! its first boot. So the builder reads each module's `.modinfo` section (name, dependencies, aliases) and writes the
//! same indices: text, and
//! the binary tries that libkmod reads (layout at [`trie`]).

use crate::{deb, initramfs};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

/// Largest unpacked module.
pub const MODULE_BYTES_MAX: u64 = 128 << 20;
/// Longest alias; also bounds the depth of a trie.
const ALIAS_BYTES_MAX: usize = 1024;

/// What a module says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// Path under `/usr/lib/modules/VERSION/`.
    pub path: String,
    /// Names of the modules that it needs, underscores for hyphens.
    pub depends: Vec<String>,
    /// Patterns of the hardware and the interfaces that it serves.
    pub aliases: Vec<String>,
    /// Modules better loaded before or after it.
    pub softdeps: Vec<String>,
}

/// True for files that are kernel modules, by their name.
pub fn is_module(path: &str) -> bool {
    path.starts_with("usr/lib/modules/") && (path.ends_with(".ko") || path.ends_with(".ko.xz"))
}

/// The name by which a module is known: its file's, underscores for hyphens.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// What [`read`] needs of a module's file: plain ones are large, but say all in a few hundred bytes. Kept as they are: compressed
/// ones, and those that the initial RAM disk may need.
pub fn essence(path: &str, bytes: Vec<u8>) -> Vec<u8> {
    let keep = path.ends_with(".xz") || initramfs::may_hold(path);
    if keep { bytes } else { modinfo(&bytes).unwrap_or_default().to_vec() }
}

/// Reads what a module says about itself from its [`essence`]; a file that is no module says nothing.
pub fn read(path: &str, essence: &[u8]) -> Module {
    let unpacked;
    let records = if path.ends_with(".xz") {
        unpacked = deb::unxz(essence, MODULE_BYTES_MAX).unwrap_or_default();
        modinfo(&unpacked).unwrap_or_default()
    } else {
        modinfo(essence).unwrap_or(essence)
    };
    let mut module = Module { path: path.to_owned(), ..Module::default() };
    for record in records.split(|byte| *byte == 0) {
        let Some((key, value)) = std::str::from_utf8(record).ok().and_then(|text| text.split_once('='))
        else {
            continue;
        };
        match key {
            "depends" => module
                .depends
                .extend(value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_"))),
            "alias" if is_alias(value) => module.aliases.push(value.to_owned()),
            "softdep" if !value.contains('\n') => module.softdeps.push(value.to_owned()),
            _ => {}
        }
    }
    module
}

fn is_alias(text: &str) -> bool {
    !text.is_empty() && text.len() <= ALIAS_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Underscores for hyphens outside brackets, as libkmod looks aliases up.
fn normal_alias(text: &str) -> String {
    let mut inside = false;
    let normal = text.chars().map(|c| {
        inside = (inside || c == '[') && c != ']';
        if c == '-' && !inside { '_' } else { c }
    });
    normal.collect()
}

/// The `.modinfo` section of a 64-bit little-endian ELF file (ELF-64 Object File Format, "File header" and "Sections").
fn modinfo(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize, size: usize| -> Option<usize> {
        let bytes = image.get(at..at.checked_add(size)?)?;
        usize::try_from(bytes.iter().rev().fold(0u64, |value, byte| (value << 8) | u64::from(*byte))).ok()
    };
    if image.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, entry_size, count, names) =
        (field(0x28, 8)?, field(0x3a, 2)?, field(0x3c, 2)?, field(0x3e, 2)?);
    let section = |number: usize| -> Option<(usize, &[u8])> {
        let at = table.checked_add(number.checked_mul(entry_size)?)?;
        let (name, start, size) =
            (field(at, 4)?, field(at.checked_add(0x18)?, 8)?, field(at.checked_add(0x20)?, 8)?);
        Some((name, image.get(start..start.checked_add(size)?)?))
    };
    let (_, names) = section(names)?;
    let found = (0..count)
        .filter_map(section)
        .find(|(name, _)| names.get(*name..).is_some_and(|rest| rest.starts_with(b".modinfo\0")));
    found.map(|(_, bytes)| bytes)
}

/// Reads many modules with all processors.
pub fn read_all(files: &[(String, Vec<u8>)]) -> Vec<Module> {
    let workers = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(1, 8));
    let queue = Mutex::new(files.iter());
    let found = Mutex::new(Vec::with_capacity(files.len()));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((path, bytes)) = queue.lock().ok().and_then(|mut queue| queue.next()) {
                    let module = read(path, bytes);
                    if let Ok(mut found) = found.lock() {
                        found.push(module);
                    }
                }
            });
        }
    });
    let mut modules = found.into_inner().unwrap_or_default();
    modules.sort_unstable_by(|left: &Module, right| left.path.cmp(&right.path));
    modules
}

/// Makes the index files of one kernel: name and contents. `builtin` is the kernel's own `modules.builtin`.
pub fn indices(modules: &[Module], builtin: &str) -> Vec<(&'static str, Vec<u8>)> {
    let by_name: BTreeMap<String, &Module> =
        modules.iter().map(|module| (name_of(&module.path), module)).collect();
    let (mut dep, mut alias, mut softdep, mut devname) =
        (String::new(), String::new(), String::new(), String::new());
    let mut dep_trie: Keys = BTreeMap::new();
    let mut alias_trie: Keys = BTreeMap::new();
    for (number, module) in (0u32..).zip(modules) {
        let name = name_of(&module.path);
        let needed: Vec<&str> = needed(module, &by_name).iter().map(|module| module.path.as_str()).collect();
        let line = format!("{}: {}", module.path, needed.join(" ")).trim_end().to_owned();
        let _ = writeln!(dep, "{line}");
        insert(&mut dep_trie, &name, number, line);
        for pattern in &module.aliases {
            let _ = writeln!(alias, "alias {pattern} {name}");
            insert(&mut alias_trie, &normal_alias(pattern), number, name.clone());
        }
        for text in &module.softdeps {
            let _ = writeln!(softdep, "softdep {name} {text}");
        }
        if let Some(line) = device_name(&name, module) {
            let _ = writeln!(devname, "{line}");
        }
    }
    let mut builtin_trie: Keys = BTreeMap::new();
    builtin.lines().for_each(|path| insert(&mut builtin_trie, &name_of(path), 0, String::new()));
    vec![
        ("modules.dep", dep.into_bytes()),
        ("modules.dep.bin", trie(&dep_trie)),
        ("modules.alias", alias.into_bytes()),
        ("modules.alias.bin", trie(&alias_trie)),
        ("modules.builtin.bin", trie(&builtin_trie)),
        ("modules.softdep", softdep.into_bytes()),
        ("modules.devname", devname.into_bytes()),
    ]
}

fn insert(keys: &mut Keys, key: &str, priority: u32, value: String) {
    if is_alias(key) {
        keys.entry(key.as_bytes().to_vec()).or_default().push((priority, value));
    }
}

/// The modules of these names that there are, with everything that they need; each once.
pub fn with_needed<'m>(names: &[&str], modules: &'m [Module]) -> Vec<&'m Module> {
    let by_name: BTreeMap<String, &Module> =
        modules.iter().map(|module| (name_of(&module.path), module)).collect();
    let mut found: BTreeMap<&str, &Module> = BTreeMap::new();
    for module in names.iter().filter_map(|name| by_name.get(*name).copied()) {
        let all = needed(module, &by_name).into_iter().chain([module]);
        found.extend(all.map(|module| (module.path.as_str(), module)));
    }
    found.into_values().collect()
}

/// Everything that a module needs, each before what it needs itself: modprobe loads from the end.
fn needed<'m>(module: &'m Module, by_name: &BTreeMap<String, &'m Module>) -> Vec<&'m Module> {
    fn visit<'m>(
        module: &'m Module,
        by_name: &BTreeMap<String, &'m Module>,
        open: &mut Vec<&'m str>,
        done: &mut Vec<&'m Module>,
    ) {
        // A cycle cannot be loaded anyway; depth is bounded by the number of modules that differ.
        if open.contains(&module.path.as_str())
            || done.iter().any(|known| known.path == module.path)
            || open.len() > 64
        {
            return;
        }
        open.push(&module.path);
        module
            .depends
            .iter()
            .filter_map(|name| by_name.get(name))
            .for_each(|next| visit(next, by_name, open, done));
        open.pop();
        done.push(module);
    }
    let mut done = Vec::new();
    visit(module, by_name, &mut Vec::new(), &mut done);
    done.pop();
    done.reverse();
    done
}

/// The device file that loads the module when opened: its `devname:` with the number of its `char-major-` or `block-major-` alias.
fn device_name(name: &str, module: &Module) -> Option<String> {
    let device = module.aliases.iter().find_map(|alias| alias.strip_prefix("devname:"))?;
    let number = module.aliases.iter().find_map(|alias| {
        let (kind, rest) = alias
            .strip_prefix("char-major-")
            .map(|rest| ('c', rest))
            .or_else(|| Some(('b', alias.strip_prefix("block-major-")?)))?;
        let (major, minor) = rest.split_once('-')?;
        Some(format!("{kind}{}:{}", major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    })?;
    Some(format!("{name} {device} {number}"))
}

/// Keys with their values, each with its priority.
pub type Keys = BTreeMap<Vec<u8>, Vec<(u32, String)>>;
/// A key with its values.
type KeyEntry<'a> = (&'a [u8], &'a [(u32, String)]);

const HAS_PREFIX: u32 = 0x8000_0000;
const HAS_VALUES: u32 = 0x4000_0000;
const HAS_CHILDREN: u32 = 0x2000_0000;

/// Writes keys as libkmod's index: magic, version and root, then nodes, all numbers big-endian.
///
/// A reference to a node is its place with flags that say which of its parts are there: a prefix ended by zero; the
/// first and the last byte of its
/// children with a reference for each byte between; a count of values, each a priority and a text ended by zero.
pub fn trie(keys: &Keys) -> Vec<u8> {
    let mut file = vec![0xb0, 0x07, 0xf4, 0x57, 0, 2, 0, 1, 0, 0, 0, 0];
    let entries: Vec<KeyEntry<'_>> =
        keys.iter().map(|(key, values)| (key.as_slice(), values.as_slice())).collect();
    let root = write_node(&entries, 0, &mut file);
    if let Some(place) = file.get_mut(8..12) {
        place.copy_from_slice(&root.to_be_bytes());
    }
    file
}

/// Writes the node for sorted keys that agree in their first `depth` bytes, after its children, and returns the reference to it.
fn write_node(entries: &[KeyEntry<'_>], depth: usize, file: &mut Vec<u8>) -> u32 {
    let tail = |entry: Option<&(&'_ [u8], _)>| {
        entry.map_or(Vec::new(), |(key, _)| key.get(depth..).unwrap_or_default().to_vec())
    };
    let (first, last) = (tail(entries.first()), tail(entries.last()));
    let prefix: Vec<u8> =
        first.iter().zip(&last).take_while(|(left, right)| left == right).map(|(byte, _)| *byte).collect();
    let end = depth.saturating_add(prefix.len());
    let (own, below): (Vec<_>, Vec<_>) = entries.iter().copied().partition(|(key, _)| key.len() == end);
    let children: Vec<(u8, u32)> = below
        .chunk_by(|left, right| left.0.get(end) == right.0.get(end))
        .filter_map(|group| {
            let byte = *group.first()?.0.get(end)?;
            Some((byte, write_node(group, end.saturating_add(1), file)))
        })
        .collect();
    let mut reference = u32::try_from(file.len()).unwrap_or(0);
    if !prefix.is_empty() {
        reference |= HAS_PREFIX;
        file.extend(prefix);
        file.push(0);
    }
    if let (Some((from, _)), Some((to, _))) = (children.first(), children.last()) {
        reference |= HAS_CHILDREN;
        file.extend([*from, *to]);
        for byte in *from..=*to {
            let child = children.iter().find(|(found, _)| *found == byte).map_or(0, |(_, child)| *child);
            file.extend(child.to_be_bytes());
        }
    }
    let mut values: Vec<_> = own.into_iter().flat_map(|(_, values)| values).collect();
    if !values.is_empty() {
        reference |= HAS_VALUES;
        values.sort();
        file.extend(u32::try_from(values.len()).unwrap_or(0).to_be_bytes());
        for (priority, text) in values {
            file.extend(priority.to_be_bytes());
            file.extend(text.bytes());
            file.push(0);
        }
    }
    reference
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A module with one section besides the names.
    fn elf(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut image = b"\x7fELF\x02\x01".to_vec();
        image.resize(64, 0);
        let section = |name: u32, bytes: &[u8], image: &mut Vec<u8>| {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(image.len() as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            image.extend(bytes);
            header
        };
        let headers = [section(1, modinfo, &mut image), section(10, names, &mut image)].concat();
        let table = image.len() as u64;
        image[0x28..0x30].copy_from_slice(&table.to_le_bytes());
        image[0x3a..0x40].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
        image.extend(headers);
        image
    }

    /// Looks a key up as libkmod does, without wildcards.
    fn look_up(file: &[u8], key: &str) -> Vec<String> {
        let number = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
        let text = |at: usize| file[at..].split(|byte| *byte == 0).next().unwrap().to_vec();
        let (mut reference, mut rest) = (number(8), key.as_bytes());
        loop {
            let mut at = (reference & 0x0fff_ffff) as usize;
            if reference & HAS_PREFIX != 0 {
                let prefix = text(at);
                at += prefix.len() + 1;
                let Some(after) = rest.strip_prefix(prefix.as_slice()) else { return Vec::new() };
                rest = after;
            }
            let mut next = 0;
            if reference & HAS_CHILDREN != 0 {
                let (from, to) = (file[at], file[at + 1]);
                if let Some(byte) = rest.first().filter(|byte| (from..=to).contains(*byte)) {
                    next = number(at + 2 + usize::from(byte - from) * 4);
                }
                at += 2 + usize::from(to - from + 1) * 4;
            }
            if rest.is_empty() {
                let mut found = Vec::new();
                if reference & HAS_VALUES != 0 {
                    let count = number(at);
                    at += 4;
                    for _ in 0..count {
                        let value = text(at + 4);
                        at += 5 + value.len();
                        found.push(String::from_utf8(value).unwrap());
                    }
                }
                return found;
            }
            if next == 0 {
                return Vec::new();
            }
            (reference, rest) = (next, &rest[1..]);
        }
    }

    #[test]
    fn modules_are_found_by_name_and_alias() {
        let bytes = elf(b"alias=virtio:d00000001v*\0alias=char-major-10-229\0alias=devname:x-y\0depends=net-core,b\0softdep=pre: c\0name=a\0");
        let a = read("kernel/a-mod.ko", &essence("a.ko", bytes));
        assert_eq!(a.depends, ["net_core", "b"]);
        let b = Module { path: "kernel/b.ko".into(), depends: vec!["net_core".into()], ..Module::default() };
        let core = Module { path: "kernel/net-core.ko".into(), ..Module::default() };
        let files = indices(&[a, b, core], "kernel/fs/ext4/ext4.ko\n");
        let file = |name: &str| files.iter().find(|(found, _)| *found == name).unwrap().1.clone();
        assert_eq!(
            look_up(&file("modules.dep.bin"), "a_mod"),
            ["kernel/a-mod.ko: kernel/b.ko kernel/net-core.ko"]
        );
        assert_eq!(look_up(&file("modules.dep.bin"), "b"), ["kernel/b.ko: kernel/net-core.ko"]);
        assert_eq!(look_up(&file("modules.alias.bin"), "virtio:d00000001v*"), ["a_mod"]);
        assert_eq!(look_up(&file("modules.builtin.bin"), "ext4"), [""]);
        assert_eq!(file("modules.softdep"), b"softdep a_mod pre: c\n");
        assert_eq!(file("modules.devname"), b"a_mod x-y c10:229\n");
    }

    #[test]
    fn knots_end() {
        let a = Module { path: "a.ko".into(), depends: vec!["b".into()], ..Module::default() };
        let b = Module { path: "b.ko".into(), depends: vec!["a".into()], ..Module::default() };
        assert_eq!(indices(&[a, b], "")[0].1, b"a.ko: b.ko\nb.ko: a.ko\n");
    }

    proptest! {
        #[test]
        fn every_key_is_found_again(keys in proptest::collection::btree_map("[a-d_*:]{1,6}", "[a-z]{0,4}", 0..40)) {
            let keys: Keys = keys.into_iter().map(|(key, value)| (key.into_bytes(), vec![(1, value)])).collect();
            let file = trie(&keys);
            for (key, values) in &keys {
                let found = look_up(&file, std::str::from_utf8(key).unwrap());
                prop_assert_eq!(found, vec![values[0].1.clone()]);
            }
            prop_assert!(look_up(&file, "zz").is_empty());
        }

        #[test]
        fn any_bytes_are_survived(cut in 0usize..400, place in 0usize..400, value: u8) {
            let mut image = elf(b"alias=a\0depends=b\0");
            let last = image.len() - 1;
            image[place.min(last)] = value;
            image.truncate(cut.min(last));
            read("x.ko.xz", &image);
            read("x.ko", &essence("x.ko", image));
        }
    }
}
