//! A new file takes the place of an image: whole, in one step, as its owner has it, and never under somebody who uses it.

use super::options::usage;
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A name beside the target for what is not whole yet.
pub fn beside(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".{}.partial", std::process::id()));
    target.with_file_name(name)
}

/// Makes an empty file that is its owner's alone, for what must not be read by others before it has another's mode.
pub fn make_private(partial: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(partial);
    file.map(drop).with_context(|| format!("cannot make {}", partial.display()))
}

pub fn directory(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Locks what is there as one who writes it would, for as long as the value lives; `None` if there is nothing, or nothing
/// that could be locked.
pub fn hold(file: &Path) -> Result<Option<File>> {
    // Another one may take its place before it is locked.
    for _ in 0..3 {
        // Some network file systems give the lock to writers only.
        let opened = OpenOptions::new().read(true).write(true).open(file).or_else(|_| File::open(file));
        let Ok(opened) = opened else { return Ok(None) };
        let locked = flock(&opened, FlockOperation::NonBlockingLockExclusive);
        if locked == Err(rustix::io::Errno::WOULDBLOCK) {
            break;
        }
        if image::storage::is_at(&opened, file) {
            return Ok(Some(opened));
        }
    }
    Err(image::Error::InUse { path: file.to_path_buf() }.into())
}

/// Refuses a file with several names: all others would keep the old content.
pub fn check_names(file: &Path, metadata: &Metadata) -> Result<()> {
    match metadata.nlink() {
        0 | 1 => Ok(()),
        count => Err(usage(format!(
            "{} is one of {count} names of a file (hard links), and only this one would become new: remove the others first",
            file.display()
        ))),
    }
}

/// Gives `partial` the mode and the owner of what it replaces, and then its name. Both are stable afterwards.
pub fn replace(partial: &Path, file: &Path, old: &Metadata) -> Result<()> {
    let new = File::open(partial)?;
    let own = new.metadata()?;
    // The owner first: a change of it takes bits from the mode.
    if (own.uid(), own.gid()) != (old.uid(), old.gid()) {
        std::os::unix::fs::fchown(&new, Some(old.uid()), Some(old.gid()))
            .with_context(|| format!("cannot give the new {} to its owner", file.display()))?;
    }
    new.set_permissions(PermissionsExt::from_mode(old.mode() & 0o7777))?;
    new.sync_all()?;
    rename(partial, file)?;
    Ok(File::open(directory(file))?.sync_all()?)
}

/// Gives `partial` its name.
pub fn rename(partial: &Path, file: &Path) -> Result<()> {
    std::fs::rename(partial, file).with_context(|| format!("cannot rename the copy to {}", file.display()))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_used_or_has_other_names_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let [file, other] = ["a", "b"].map(|name| directory.path().join(name));
        assert!(hold(&file).unwrap().is_none());
        std::fs::write(&file, "old").unwrap();
        let held = hold(&file).unwrap();
        assert!(hold(&file).unwrap_err().to_string().contains("in use"));
        drop(held);
        hold(&file).unwrap().unwrap();
        check_names(&file, &file.metadata().unwrap()).unwrap();
        std::fs::hard_link(&file, &other).unwrap();
        assert!(check_names(&file, &file.metadata().unwrap()).unwrap_err().to_string().contains("2 names"));
    }

    #[test]
    fn the_new_one_is_as_the_old_one_was() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
        let partial = beside(&file);
        std::fs::write(&partial, "new").unwrap();
        replace(&partial, &file, &file.metadata().unwrap()).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o640);
        assert!(!partial.exists());
    }
}
