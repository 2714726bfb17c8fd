//! The data part of a package: a tar archive put into a tree.
//!
//! The `tar` crate reads headers; long names are joined here, with a limit, because a name of a gigabyte is a memory bomb.

use crate::tree::{self, Device, Metadata, Package, Root, plain_parts};
use std::io::{self, Read};
use tar::EntryType;

/// Why a data part cannot be put in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive is broken.
    #[error("its archive of files is broken: {0}")]
    Broken(String),
    /// A file has no place.
    #[error(transparent)]
    Tree(#[from] tree::Error),
}

/// Longest name or extended header.
const NAME_BYTES_MAX: u64 = 64 << 10;
/// Most files in a package.
const FILES_MAX: usize = 1_000_000;

fn broken(error: io::Error) -> Error {
    Error::Broken(error.to_string())
}

/// Names and sizes that a header announces for the entry after it.
#[derive(Default)]
struct Announced {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

/// Puts every entry of a tar stream into the tree and returns the paths in the form of dpkg's `.list` files (`/.`, `/usr`, ...).
pub fn put_in(root: &mut Root<'_>, package: &Package<'_>, data: &mut dyn Read) -> Result<Vec<String>, Error> {
    let mut list = Vec::new();
    let mut archive = tar::Archive::new(data);
    let mut announced = Announced::default();
    for entry in archive.entries().map_err(broken)?.raw(true) {
        let mut entry = entry.map_err(broken)?;
        match entry.header().entry_type() {
            EntryType::GNULongName => announced.path = Some(long_name(&mut entry)?),
            EntryType::GNULongLink => announced.link = Some(long_name(&mut entry)?),
            EntryType::XHeader => read_pax(&mut entry, &mut announced)?,
            EntryType::XGlobalHeader => {}
            _ => {
                let path = put_entry(root, package, &mut entry, std::mem::take(&mut announced))?;
                list.push(if path.is_empty() { "/.".to_owned() } else { format!("/{path}") });
                if list.len() > FILES_MAX {
                    return Err(Error::Broken(format!("more than {FILES_MAX} files")));
                }
            }
        }
    }
    Ok(list)
}

fn long_name(entry: &mut tar::Entry<'_, &mut dyn Read>) -> Result<Vec<u8>, Error> {
    if entry.size() > NAME_BYTES_MAX {
        return Err(Error::Broken("a name is too long".to_owned()));
    }
    let mut name = Vec::new();
    entry.read_to_end(&mut name).map_err(broken)?;
    name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
    Ok(name)
}

/// Reads the records of a pax header that change names (POSIX pax, "pax Extended Header").
fn read_pax(entry: &mut tar::Entry<'_, &mut dyn Read>, announced: &mut Announced) -> Result<(), Error> {
    if entry.size() > NAME_BYTES_MAX {
        return Err(Error::Broken("an extended header is too long".to_owned()));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(broken)?;
    for record in tar::PaxExtensions::new(&bytes) {
        let record = record.map_err(broken)?;
        match record.key_bytes() {
            b"path" => announced.path = Some(record.value_bytes().to_vec()),
            b"linkpath" => announced.link = Some(record.value_bytes().to_vec()),
            b"size" => return Err(Error::Broken("a file of 8 GiB or more".to_owned())),
            _ => {}
        }
    }
    Ok(())
}

fn put_entry(
    root: &mut Root<'_>,
    package: &Package<'_>,
    entry: &mut tar::Entry<'_, &mut dyn Read>,
    announced: Announced,
) -> Result<String, Error> {
    let path = text(announced.path.unwrap_or_else(|| entry.path_bytes().into_owned()))?;
    let path = plain_parts(&path)?.join("/");
    let header = entry.header();
    let mut meta = Metadata {
        mode: u16::try_from(header.mode().map_err(broken)? & 0o7777).unwrap_or(0),
        uid: u32::try_from(header.uid().map_err(broken)?)
            .map_err(|_| Error::Broken("a strange owner".to_owned()))?,
        gid: u32::try_from(header.gid().map_err(broken)?)
            .map_err(|_| Error::Broken("a strange group".to_owned()))?,
        mtime: i64::try_from(header.mtime().map_err(broken)?).unwrap_or(0),
    };
    let link = || {
        text(
            announced
                .link
                .clone()
                .unwrap_or_else(|| entry.link_name_bytes().unwrap_or_default().into_owned()),
        )
    };
    let numbers = || -> Result<(u32, u32), Error> {
        let major = header.device_major().map_err(broken)?.unwrap_or(0);
        Ok((major, header.device_minor().map_err(broken)?.unwrap_or(0)))
    };
    match header.entry_type() {
        EntryType::Directory => root.directory(package, &path, &meta)?,
        EntryType::Regular | EntryType::Continuous => {
            let size = entry.size();
            root.file(package, &path, &meta, size, entry)?;
        }
        EntryType::Symlink => {
            let target = link()?;
            if target.is_empty() || target.contains('\0') {
                return Err(Error::Broken(format!("link {path} leads nowhere")));
            }
            meta.mode = 0o777;
            root.symlink(package, &path, &meta, &target)?;
        }
        EntryType::Link => {
            let target = plain_parts(&link()?)?.join("/");
            root.hard_link(package, &path, &meta, &target)?;
        }
        EntryType::Char => {
            let (major, minor) = numbers()?;
            root.device(package, &path, &meta, Device::Character(major, minor))?;
        }
        EntryType::Block => {
            let (major, minor) = numbers()?;
            root.device(package, &path, &meta, Device::Block(major, minor))?;
        }
        EntryType::Fifo => root.device(package, &path, &meta, Device::Fifo)?,
        other => {
            return Err(Error::Broken(format!("{path} is of a kind that packages do not have ({other:?})")));
        }
    }
    Ok(path)
}

fn text(bytes: Vec<u8>) -> Result<String, Error> {
    String::from_utf8(bytes).map_err(|_| Error::Broken("a name is not UTF-8".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Keep, Tree};
    use proptest::prelude::*;

    struct Nowhere;

    impl Tree for Nowhere {
        fn directory(&mut self, _: &str, _: &Metadata) -> io::Result<()> {
            Ok(())
        }
        fn file(&mut self, _: &str, _: &Metadata, size: u64, content: &mut dyn Read) -> io::Result<()> {
            io::copy(&mut content.take(size), &mut io::sink()).map(drop)
        }
        fn symlink(&mut self, _: &str, _: &Metadata, _: &str) -> io::Result<()> {
            Ok(())
        }
        fn hard_link(&mut self, _: &str, _: &str) -> io::Result<()> {
            Ok(())
        }
        fn device(&mut self, _: &str, _: &Metadata, _: Device) -> io::Result<()> {
            Ok(())
        }
    }

    fn put(bytes: &[u8]) -> Result<Vec<String>, Error> {
        let names = ["p".to_owned()];
        let package = Package { number: 0, name: "p", yields: &[], names: &names, digests: &[] };
        let mut nowhere = Nowhere;
        let mut root = Root::new(&mut nowhere, Keep { wants: |_| false, essence: |_, bytes| bytes }, 0)?;
        put_in(&mut root, &package, &mut &*bytes)
    }

    fn sample() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let header = |kind| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(0);
            header
        };
        builder.append_data(&mut header(EntryType::Directory), "./", io::empty()).unwrap();
        let long = format!("usr/{}", "x".repeat(200));
        builder.append_data(&mut header(EntryType::Regular), &long, io::empty()).unwrap();
        builder.append_link(&mut header(EntryType::Link), "usr/link", &long).unwrap();
        builder.append_link(&mut header(EntryType::Symlink), "usr/sym", "/etc/x").unwrap();
        builder.append_data(&mut header(EntryType::Fifo), "usr/fifo", io::empty()).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn reads_long_names_and_all_kinds() {
        let long = format!("/usr/{}", "x".repeat(200));
        assert_eq!(put(&sample()).unwrap(), ["/.", &long, "/usr/link", "/usr/sym", "/usr/fifo"]);
    }

    #[test]
    fn a_name_of_a_gigabyte_is_refused() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(1 << 30);
        header.set_cksum();
        assert!(put(header.as_bytes()).unwrap_err().to_string().contains("too long"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(cut in 0usize..6000, places in proptest::collection::vec((0usize..6000, any::<u8>()), 0..4)) {
            let mut bytes = sample();
            let last = bytes.len() - 1;
            for (place, value) in places {
                bytes[place.min(last)] = value;
            }
            bytes.truncate(cut.min(last));
            let _ = put(&bytes);
        }
    }
}
