//! Images by their file names: formats, chains of backing files, new images.
//!
//! A format is never believed because a guest has written it. Whoever opens an image says its format; where nobody does,
//! the file's beginning is looked at, and then nothing that it names is opened: no backing file, no data file. A chain is
//! followed only where the format was said, for a header is then what the host's user trusts.

use crate::chain::Chain;
use crate::disk::{Disk, Error};
use crate::format::qcow2::{self, CreateOptions, Parts, Qcow2};
use crate::format::qed::{self, Qed};
use crate::format::vhd::{self, Vhd};
use crate::format::vhdx::{self, Vhdx};
use crate::format::vmdk::{self, Vmdk};
use crate::format::{Container, Format, Raw, probe};
use crate::storage::{self, CacheMode, Storage, StorageFile, WriteThrough};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest chain of images.
const CHAIN_MAX: usize = 250;

/// How an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Its format; `None` looks at the file and trusts nothing that it names.
    pub format: Option<Format>,
    /// Nothing is written.
    pub read_only: bool,
    /// With no format said: what a header names is opened all the same, and a backing file whose format is not said is
    /// looked at too. Whoever may write the image then chooses what is read: only for programs that have always done so.
    pub follow_guess: bool,
    /// Backing files are not opened: what they hold reads as zeroes. For looking at one image of a chain.
    pub alone: bool,
    /// Somebody else may use the file meanwhile, and write it: it can only be read.
    pub shared: bool,
    /// What stands between writes and stable storage.
    pub cache: CacheMode,
}

/// An open image with what is below it.
pub struct Image {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The same, where the format keeps tables.
    pub container: Option<Arc<dyn Container>>,
    /// The same, where the format is qcow2.
    pub qcow2: Option<Arc<Qcow2>>,
    /// The image below.
    pub backing: Option<Box<Image>>,
    /// The file.
    pub storage: Arc<dyn Storage>,
}

/// A name in an image, as a path: relative ones are beside the image.
pub fn beside(image: &Path, name: &str) -> Result<PathBuf, Error> {
    let plain = name.strip_prefix("file:").unwrap_or(name);
    let scheme = plain.split_once(':').map(|(scheme, _)| scheme);
    if scheme.is_some_and(|scheme| !scheme.is_empty() && !scheme.contains('/')) {
        let what = format!("it names {name:?}, which is no file; only files can be opened");
        return Err(Error::Unsupported { path: image.to_path_buf(), what });
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(plain))
}

impl Image {
    /// Opens an image.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, Error> {
        Self::open_as(path, options, false)
    }

    /// Opens an image that may be marked as damaged, for a check that repairs.
    pub fn open_for_repair(path: &Path, options: OpenOptions) -> Result<Self, Error> {
        Self::open_as(path, options, true)
    }

    fn open_as(path: &Path, options: OpenOptions, repair: bool) -> Result<Self, Error> {
        // From the top down what is named, then from the bottom up what is opened: chains are long, and stacks short.
        let mut layers = vec![Layer::find(path, options)?];
        while let Some(next) = layers.last().map(|layer| layer.below(options)).transpose()?.flatten() {
            if layers.len() >= CHAIN_MAX {
                let what = format!("the chain of backing files has more than {CHAIN_MAX} images");
                return Err(Error::Unsupported { path: path.to_path_buf(), what });
            }
            layers.push(next);
        }
        let mut image = None;
        while let Some(layer) = layers.pop() {
            image = Some(layer.open(image, layers.is_empty(), repair)?);
        }
        let mut image: Image = image.ok_or_else(|| Error::Options("there is no image".into()))?;
        if options.cache.is_write_through() && !image.disk.read_only() {
            image.disk = Arc::new(WriteThrough(image.disk));
        }
        Ok(image)
    }

    /// The qcow2 image, or a sentence that says that it is none.
    pub fn as_qcow2(&self, what: &str) -> Result<&Arc<Qcow2>, Error> {
        self.qcow2.as_ref().ok_or_else(|| Error::Unsupported {
            path: self.path.clone(),
            what: format!("{} images have no {what}; qcow2 images have", self.format),
        })
    }

    /// The image as one that can build on another, or a sentence that says that it cannot.
    pub fn as_container(&self, what: &str) -> Result<&Arc<dyn Container>, Error> {
        self.container.as_ref().ok_or_else(|| Error::Unsupported {
            path: self.path.clone(),
            what: format!("{} images have no {what}", self.format),
        })
    }

    /// The disks of the chain, from the top down.
    fn layers(&self) -> Vec<Arc<dyn Disk>> {
        std::iter::successors(Some(self), |image| image.backing.as_deref())
            .map(|image| image.disk.clone())
            .collect()
    }

    fn of(layer: Layer, opened: Opened, backing: Option<Image>) -> Self {
        let (disk, container, qcow2): (Arc<dyn Disk>, Option<Arc<dyn Container>>, _) = match opened {
            Opened::Raw(raw) => (Arc::new(raw), None, None),
            Opened::Qcow2(qcow2) => (qcow2.clone(), Some(qcow2.clone()), Some(qcow2)),
            Opened::Other(container) => (container.clone(), Some(container), None),
        };
        let Layer { path, format, storage, .. } = layer;
        Self { path, format, disk, container, qcow2, backing: backing.map(Box::new), storage }
    }

    /// Makes all that was written stable.
    pub fn close(&self) -> Result<(), Error> {
        let done = match &self.container {
            Some(container) => container.close(),
            None if self.disk.read_only() => Ok(()),
            None => self.disk.flush(),
        };
        done.map_err(|source| Error::io(&self.path, source))
    }
}

/// What a file's header says, by its format.
enum Header {
    Raw,
    Qcow2(Box<qcow2::Header>),
    Qed(qed::Header),
    Vhd(Box<vhd::Header>),
    Vhdx(vhdx::Header),
    Vmdk(vmdk::Header),
}

impl Header {
    fn read(format: Format, path: &Path, storage: &dyn Storage) -> Result<Self, Error> {
        Ok(match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2(Box::new(Qcow2::read_header(path, storage)?)),
            Format::Qed => Self::Qed(Qed::read_header(path, storage)?),
            Format::Vhd => Self::Vhd(Box::new(Vhd::read_header(path, storage)?)),
            Format::Vhdx => Self::Vhdx(Vhdx::read_header(path, storage)?),
            Format::Vmdk => Self::Vmdk(Vmdk::read_header(path, storage)?),
        })
    }

    /// The image that it builds on, and its format if that is said.
    fn backing(&self) -> Option<(&str, Option<&str>)> {
        match self {
            Self::Raw | Self::Vhdx(_) => None,
            Self::Qcow2(header) => Some((header.backing.as_deref()?, header.backing_format.as_deref())),
            Self::Qed(header) => {
                Some((header.backing.as_deref()?, header.backing_is_raw().then_some(Format::Raw.name())))
            }
            Self::Vhd(header) => Some((&header.parent()?.name, Some(Format::Vhd.name()))),
            Self::Vmdk(header) => Some((header.parent.as_deref()?, Some(Format::Vmdk.name()))),
        }
    }

    /// Whether an image below is the one that is meant, as far as the format can tell.
    fn accepts(&self, below: &Self) -> bool {
        match (self, below) {
            (Self::Vhd(child), Self::Vhd(below)) => {
                child.parent().is_none_or(|parent| parent.uuid == below.uuid)
            }
            // The content's identity: another one, or another since.
            (Self::Vmdk(child), Self::Vmdk(below)) => child.parent.is_none() || child.parent_cid == below.cid,
            _ => true,
        }
    }

    fn data_file(&self) -> Option<&str> {
        match self {
            Self::Qcow2(header) => header.data_file.as_deref(),
            _ => None,
        }
    }
}

/// An image by its format.
enum Opened {
    Raw(Raw),
    Qcow2(Arc<Qcow2>),
    Other(Arc<dyn Container>),
}

/// An image of a chain before it is opened.
struct Layer {
    path: PathBuf,
    format: Format,
    storage: Arc<dyn Storage>,
    header: Header,
    data: Option<Arc<dyn Storage>>,
    /// Somebody said the format: what the header names may be opened.
    trusted: bool,
}

impl Layer {
    fn find(path: &Path, options: OpenOptions) -> Result<Self, Error> {
        if options.shared && !options.read_only {
            // Two who write tables of one image destroy it.
            let what = "somebody else may write it meanwhile (-U, --force-share), so that it can only be read: leave that out";
            return Err(Error::Unsupported { path: path.to_path_buf(), what: what.into() });
        }
        let storage = storage::open(path, options.read_only, options.shared, options.cache)?;
        let format = match options.format {
            Some(format) => format,
            None => probe(storage.as_ref()).map_err(|source| Error::io(path, source))?,
        };
        if !options.read_only && !format.is_writable() {
            let what = format!(
                "{format} images are only read: convert it (yado image convert -O qcow2), or add `readonly`"
            );
            return Err(Error::Unsupported { path: path.to_path_buf(), what });
        }
        let header = Header::read(format, path, storage.as_ref())?;
        let trusted = options.format.is_some() || options.follow_guess;
        let mut layer = Self { path: path.to_path_buf(), format, storage, header, data: None, trusted };
        if let Some(name) = layer.header.data_file() {
            let place = layer.named(name)?;
            layer.data = Some(storage::open(&place, options.read_only, options.shared, options.cache)?);
        }
        Ok(layer)
    }

    /// A file that the image names, if it is believed.
    fn named(&self, name: &str) -> Result<PathBuf, Error> {
        if self.trusted {
            return beside(&self.path, name);
        }
        Err(Error::Unsupported {
            path: self.path.clone(),
            what: format!(
                "it builds on {name:?}, a name from inside the image, and its format was guessed: say the format (-f \
                 {format}, or format={format}) if you trust the image",
                format = self.format
            ),
        })
    }

    /// The image below.
    fn below(&self, options: OpenOptions) -> Result<Option<Self>, Error> {
        let Some((name, format)) = self.header.backing().filter(|_| !options.alone) else { return Ok(None) };
        let place = self.named(name)?;
        let format = match (self.format, format) {
            // The format can only say "raw", or "look at it": then what is found is believed no more than any guess.
            (Format::Qed, None) => None,
            (_, None) if options.follow_guess => None,
            (_, format) => Some(backing_format(&self.path, &place, format)?),
        };
        let below = Self::find(&place, OpenOptions { format, read_only: true, ..options })?;
        if !self.header.accepts(&below.header) {
            let (path, place) = (self.path.clone(), place.display());
            let what = format!(
                "{place} is not the disk that it builds on, but another one, or was changed since: find that, or copy it back"
            );
            return Err(Error::Unsupported { path, what });
        }
        Ok(Some(below))
    }

    /// Opens the image over the one below; the top one of the chain reads through all of it at once.
    fn open(mut self, backing: Option<Image>, top: bool, repair: bool) -> Result<Image, Error> {
        let below = match &backing {
            Some(image) if top => Chain::over(image.layers()),
            backing => backing.as_ref().map(|image| image.disk.clone()),
        };
        let repair = repair && top;
        let (path, storage) = (self.path.as_path(), self.storage.clone());
        let opened = match std::mem::replace(&mut self.header, Header::Raw) {
            Header::Raw => Opened::Raw(Raw::new(storage)),
            Header::Qcow2(header) => {
                let parts = Parts { backing: below, data: self.data.take() };
                let open = if repair { Qcow2::open_for_repair } else { Qcow2::open };
                Opened::Qcow2(Arc::new(open(path, storage, *header, parts)?))
            }
            Header::Qed(header) => {
                let open = if repair { Qed::open_for_repair } else { Qed::open };
                Opened::Other(Arc::new(open(path, storage, header, below)?))
            }
            Header::Vhdx(header) => Opened::Other(Arc::new(Vhdx::open(path, storage, header))),
            Header::Vmdk(header) => Opened::Other(Arc::new(Vmdk::open(path, storage, header, below))),
            Header::Vhd(header) => Opened::Other(Arc::new(Vhd::open(path, storage, *header, below)?)),
        };
        Ok(Image::of(self, opened, backing))
    }

    /// An image that was just made, with what is below it.
    fn made(
        path: &Path,
        format: Format,
        storage: Arc<dyn Storage>,
        opened: Opened,
        backing: Option<Image>,
    ) -> Image {
        let path = path.to_path_buf();
        Image::of(
            Self { path, format, storage, header: Header::Raw, data: None, trusted: true },
            opened,
            backing,
        )
    }
}

/// The format of a backing file: as the image says; where it says nothing the file must not look like anything but raw.
fn backing_format(path: &Path, place: &Path, said: Option<&str>) -> Result<Format, Error> {
    if let Some(name) = said {
        let unknown = |what: String| Error::Unsupported { path: path.to_path_buf(), what };
        return name.parse().map_err(unknown);
    }
    let storage = StorageFile::open(place, true)?;
    match probe(&storage) {
        Ok(Format::Raw) => Ok(Format::Raw),
        _ => Err(Error::Unsupported {
            path: path.to_path_buf(),
            what: format!(
                "it does not say the format of its backing file {}: say it with `yado image rebase -u -b FILE -F FORMAT`",
                place.display()
            ),
        }),
    }
}

/// The backing file of a new image.
fn below_new(path: &Path, name: &str, format: Format) -> Result<Image, Error> {
    let open = OpenOptions { format: Some(format), read_only: true, ..OpenOptions::default() };
    Image::open(&beside(path, name)?, open)
}

/// Makes a raw image: a sparse file, or one with space reserved or written.
pub fn create_raw(path: &Path, size: u64, how: crate::format::qcow2::Preallocation) -> Result<Raw, Error> {
    use crate::format::qcow2::Preallocation;
    let storage = Arc::new(StorageFile::create(path, true)?);
    let io = |source| Error::io(path, source);
    storage.set_len(size).map_err(io)?;
    match how {
        Preallocation::Off => {}
        Preallocation::Metadata => {
            return Err(Error::Options(
                "a raw image has no metadata to preallocate: use falloc or full".into(),
            ));
        }
        Preallocation::Falloc => storage.reserve(0, size).map_err(io)?,
        Preallocation::Full => {
            let zeroes = vec![0; 1 << 20];
            let mut at = 0u64;
            while at < size {
                let part = crate::endian::size(size.saturating_sub(at).min(zeroes.len() as u64));
                storage.write_bytes(at, zeroes.get(..part).unwrap_or_default()).map_err(io)?;
                at = at.saturating_add(part as u64);
            }
        }
    }
    Ok(Raw::new(storage))
}

/// Makes a qcow2 image in a file; what is there is replaced. The backing and data file are opened as they are named.
pub fn create_qcow2(path: &Path, options: &CreateOptions) -> Result<Image, Error> {
    let backing = match &options.backing {
        None => None,
        Some((name, format)) => Some(below_new(path, name, format.parse().map_err(Error::Options)?)?),
    };
    create_qcow2_over(path, options, backing)
}

/// As [`create_qcow2`], with the backing file that is named left alone: it need not be there yet.
pub fn create_qcow2_alone(path: &Path, options: &CreateOptions) -> Result<Image, Error> {
    create_qcow2_over(path, options, None)
}

fn create_qcow2_over(path: &Path, options: &CreateOptions, backing: Option<Image>) -> Result<Image, Error> {
    // What cannot be is refused before anything is overwritten.
    options.header().map_err(Error::Options)?;
    let data = match &options.data_file {
        None => None,
        Some((name, _)) => {
            Some(Arc::new(StorageFile::create(&beside(path, name)?, true)?) as Arc<dyn Storage>)
        }
    };
    let storage: Arc<dyn Storage> = Arc::new(StorageFile::create(path, true)?);
    let parts = Parts { backing: backing.as_ref().map(|image| image.disk.clone()), data };
    let qcow2 = Arc::new(Qcow2::create(path, storage.clone(), options, parts)?);
    Ok(Layer::made(path, Format::Qcow2, storage, Opened::Qcow2(qcow2), backing))
}

/// Makes a QED image in a file; what is there is replaced. The backing file is opened as it is named.
pub fn create_qed(path: &Path, options: &qed::CreateOptions) -> Result<Image, Error> {
    let backing =
        options.backing.as_ref().map(|(name, format)| below_new(path, name, *format)).transpose()?;
    options.header().map_err(Error::Options)?;
    let storage: Arc<dyn Storage> = Arc::new(StorageFile::create(path, true)?);
    let below = backing.as_ref().map(|image| image.disk.clone());
    let qed = Arc::new(Qed::create(path, storage.clone(), options, below)?);
    Ok(Layer::made(path, Format::Qed, storage, Opened::Other(qed), backing))
}

/// Makes a VHD in a file; what is there is replaced. With `parent`, the name of another VHD, it is a differencing one.
pub fn create_vhd(path: &Path, options: &vhd::CreateOptions, parent: Option<&str>) -> Result<Image, Error> {
    let mut options = options.clone();
    let below = match parent {
        None => None,
        Some(name) => {
            let below = below_new(path, name, Format::Vhd)?;
            let time =
                std::fs::metadata(&below.path).and_then(|data| data.modified()).map_or(0, vhd::seconds);
            let uuid = Vhd::read_header(&below.path, below.storage.as_ref())?.uuid;
            options.parent = Some(vhd::Parent { uuid, time, name: name.to_owned() });
            options.directory = path.parent().and_then(|directory| std::path::absolute(directory).ok());
            if options.size != below.disk.capacity() {
                return Err(Error::Options("a differencing VHD has the size of its parent".into()));
            }
            Some(below)
        }
    };
    options.check().map_err(Error::Options)?;
    let storage: Arc<dyn Storage> = Arc::new(StorageFile::create(path, true)?);
    let disk = below.as_ref().map(|image| image.disk.clone());
    let vhd = Arc::new(Vhd::create(path, storage.clone(), &options, disk)?);
    Ok(Layer::made(path, Format::Vhd, storage, Opened::Other(vhd), below))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::WriteFrom;

    fn options(format: Option<Format>) -> OpenOptions {
        OpenOptions { format, read_only: true, ..OpenOptions::default() }
    }

    #[test]
    fn nothing_that_a_guessed_image_names_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let (base, top) = (directory.path().join("base"), directory.path().join("top"));
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        let create =
            CreateOptions { backing: Some(("base".into(), "raw".into())), ..CreateOptions::new(1 << 20) };
        create_qcow2(&top, &create).unwrap().disk.write(0, &WriteFrom(&[1; 512])).unwrap();
        let refused = Image::open(&top, options(None)).err().unwrap().to_string();
        assert!(refused.contains("-f qcow2") && refused.contains("base"), "{refused}");
        let image = Image::open(&top, options(Some(Format::Qcow2))).unwrap();
        let mut bytes = [0; 1024];
        image.disk.read(0, &crate::ReadInto::new(&mut bytes)).unwrap();
        assert!(bytes[..512] == [1; 512] && bytes[512..] == [7; 512]);
        drop(image);
        let alone = OpenOptions { alone: true, ..options(None) };
        assert_eq!(Image::open(&top, alone).unwrap().format, Format::Qcow2);
        // A guest that writes a header into its raw disk gains nothing where raw was said.
        assert_eq!(Image::open(&top, options(Some(Format::Raw))).unwrap().format, Format::Raw);
    }

    #[test]
    fn what_others_may_write_is_only_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let guest = create_qcow2(&path, &CreateOptions::new(1 << 20)).unwrap();
        let how = OpenOptions { shared: true, ..options(Some(Format::Qcow2)) };
        Image::open(&path, how).unwrap();
        let writing = OpenOptions { read_only: false, ..how };
        for open in [Image::open, Image::open_for_repair] {
            let error = open(&path, writing).err().unwrap().to_string();
            assert!(error.contains("-U"), "{error}");
        }
        drop(guest);
    }

    #[test]
    fn a_chain_of_two_hundred_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let place = |number: u32| directory.path().join(number.to_string());
        std::fs::write(place(0), vec![7; 1 << 16]).unwrap();
        for number in 1..=200 {
            let below = ((number - 1).to_string(), if number == 1 { "raw" } else { "qcow2" }.to_owned());
            let create =
                CreateOptions { cluster_bits: 12, backing: Some(below), ..CreateOptions::new(1 << 16) };
            let storage = Arc::new(StorageFile::create(&place(number), false).unwrap());
            drop(Qcow2::create(&place(number), storage, &create, Parts::default()).unwrap());
        }
        let image = Image::open(&place(200), options(Some(Format::Qcow2))).unwrap();
        let mut bytes = [0; 8192];
        image.disk.read(4096, &crate::ReadInto::new(&mut bytes)).unwrap();
        assert!(bytes == [7; 8192]);
        assert_eq!(image.disk.block_status(0, 1 << 16).unwrap().depth, 200);
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (path, data) = (directory.path().join("top"), directory.path().join("data"));
        std::fs::write(&data, b"kept").unwrap();
        let bad = CreateOptions {
            data_file: Some(("data".into(), false)),
            cluster_bits: 8,
            ..CreateOptions::new(1 << 20)
        };
        assert!(create_qcow2(&path, &bad).is_err());
        assert_eq!(std::fs::read(&data).unwrap(), b"kept");
    }

    #[test]
    fn chains_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("loop");
        drop(create_qcow2(&path, &CreateOptions::new(1 << 20)).unwrap());
        let mut header = Qcow2::read_header(&path, &StorageFile::open(&path, true).unwrap()).unwrap();
        (header.backing, header.backing_format) = (Some("loop".into()), Some("qcow2".into()));
        let storage = StorageFile::open(&path, false).unwrap();
        storage.write_bytes(0, &header.encode().unwrap()).unwrap();
        drop(storage);
        let error = Image::open(&path, options(Some(Format::Qcow2))).err().unwrap();
        assert!(error.to_string().contains("chain"), "{error}");
    }
}
