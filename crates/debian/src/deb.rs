//! Package files: an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*` (deb(5)), read as a stream.

use std::io::{self, BufReader, Read};

/// Why a package file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no package file, or one cut short.
    #[error("the package file is broken: {0}")]
    Broken(&'static str),
    /// Reading or unpacking failed.
    #[error("the package file cannot be unpacked: {0}")]
    Io(#[from] io::Error),
    /// A part unpacks to more than allowed.
    #[error("the package file unpacks to more than {0} bytes")]
    TooLarge(u64),
    /// A compression that Debian does not use.
    #[error("the package file has a part {0}, whose compression is not known")]
    Compression(String),
}

/// Memory that a decompressor may use, in KiB: xz -9 takes 65 MiB.
const DECODER_KIB_MAX: u32 = 128 << 10;
/// Largest unpacked control part.
const CONTROL_BYTES_MAX: u64 = 64 << 20;
/// Largest unpacked data part.
pub const DATA_BYTES_MAX: u64 = 8 << 30;

/// One file of the control part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// Its name, such as `postinst`; never a path.
    pub name: String,
    /// Permission bits.
    pub mode: u32,
    /// What it contains.
    pub bytes: Vec<u8>,
}

/// A stream of the unpacked data part (a tar archive), which ends with an error if it grows beyond all bounds.
pub type Data<R> = Bounded<Decoder<io::Take<R>>>;

/// Reads the control part of a package file and opens its data part.
pub fn open<R: Read>(mut file: R) -> Result<(Vec<ControlFile>, Data<R>), Error> {
    let mut magic = [0; 8];
    file.read_exact(&mut magic)?;
    if &magic != b"!<arch>\n" {
        return Err(Error::Broken("it is no ar archive"));
    }
    let mut control = None;
    loop {
        let member = next_member(&mut file)?.ok_or(Error::Broken("it has no data part"))?;
        if let Some(suffix) = member.name.strip_prefix("control.tar") {
            if member.size > CONTROL_BYTES_MAX {
                return Err(Error::TooLarge(CONTROL_BYTES_MAX));
            }
            let mut packed = Vec::new();
            file.by_ref().take(member.size).read_to_end(&mut packed)?;
            let part = decoder(suffix, &member.name, packed.as_slice())?;
            control = Some(read_control(&mut Bounded { inner: part, left: CONTROL_BYTES_MAX })?);
        } else if let Some(suffix) = member.name.strip_prefix("data.tar") {
            let control = control.ok_or(Error::Broken("its data part comes before the control part"))?;
            let part = decoder(suffix, &member.name, file.take(member.size))?;
            return Ok((control, Bounded { inner: part, left: DATA_BYTES_MAX }));
        } else {
            // `debian-binary` and members whose name begins with `_`, which deb(5) lets readers skip.
            let skipped = io::copy(&mut file.by_ref().take(member.size), &mut io::sink())?;
            if skipped != member.size {
                return Err(Error::Broken("it ends within a member"));
            }
        }
        if member.size % 2 == 1 {
            file.read_exact(&mut [0])?;
        }
    }
}

struct Member {
    name: String,
    size: u64,
}

/// Reads the header of the next member of an ar archive: 60 bytes, the name first, the size at 48, ended by a back quote and a newline.
fn next_member(file: &mut impl Read) -> Result<Option<Member>, Error> {
    let mut header = [0u8; 60];
    let mut filled = 0;
    while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest)? {
            0 if filled == 0 => return Ok(None),
            0 => return Err(Error::Broken("it ends within a member header")),
            count => filled = filled.saturating_add(count),
        }
    }
    let text = |range: std::ops::Range<usize>| {
        header
            .get(range)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .map(|text| text.trim_end_matches([' ', '/']))
    };
    if header.get(58..) != Some(b"`\n".as_slice()) {
        return Err(Error::Broken("a member header has no end mark"));
    }
    let name = text(0..16).ok_or(Error::Broken("a member has a strange name"))?;
    let size =
        text(48..58).and_then(|size| size.parse().ok()).ok_or(Error::Broken("a member has no size"))?;
    Ok(Some(Member { name: name.to_owned(), size }))
}

/// The files of a control part.
fn read_control(tar: &mut dyn Read) -> Result<Vec<ControlFile>, Error> {
    let mut files = Vec::new();
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.trim_start_matches("./").to_owned();
        if !entry.header().entry_type().is_file() || name.is_empty() {
            continue;
        }
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
            return Err(Error::Broken("a control file has a strange name"));
        }
        let mode = entry.header().mode()? & 0o777;
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.push(ControlFile { name, mode, bytes });
    }
    if files.iter().any(|file| file.name == "control") {
        Ok(files)
    } else {
        Err(Error::Broken("it has no control file"))
    }
}

/// Unpacks one `.xz` file of at most `limit` bytes (an index).
pub fn unxz(packed: impl Read, limit: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let reader = lzma_rust2::XzReader::new_mem_limit(packed, true, DECODER_KIB_MAX);
    let taken = limit.checked_add(1).ok_or(Error::TooLarge(limit))?;
    reader.take(taken).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= limit) {
        Ok(bytes)
    } else {
        Err(Error::TooLarge(limit))
    }
}

/// A decompressor chosen by a member's suffix.
pub enum Decoder<R: Read> {
    /// Not compressed.
    Plain(R),
    /// `.gz`
    Gzip(Box<flate2::read::MultiGzDecoder<R>>),
    /// `.xz`
    Xz(Box<lzma_rust2::XzReader<BufReader<R>>>),
    /// `.zst`
    Zstd(Box<ruzstd::decoding::StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>),
}

fn decoder<R: Read>(suffix: &str, member: &str, packed: R) -> Result<Decoder<R>, Error> {
    Ok(match suffix {
        "" => Decoder::Plain(packed),
        ".gz" => Decoder::Gzip(Box::new(flate2::read::MultiGzDecoder::new(packed))),
        ".xz" => {
            let packed = BufReader::with_capacity(64 << 10, packed);
            Decoder::Xz(Box::new(lzma_rust2::XzReader::new_mem_limit(packed, true, DECODER_KIB_MAX)))
        }
        ".zst" => {
            let window_max = u64::from(DECODER_KIB_MAX) << 10;
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, window_max);
            Decoder::Zstd(Box::new(
                decoder.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?,
            ))
        }
        _ => return Err(Error::Compression(member.to_owned())),
    })
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Decoder::Plain(reader) => reader.read(buffer),
            Decoder::Gzip(decoder) => decoder.read(buffer),
            Decoder::Xz(decoder) => decoder.read(buffer),
            Decoder::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// A stream that fails once more than its bound has been read.
pub struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let read = u64::try_from(count).unwrap_or(u64::MAX);
        self.left =
            self.left.checked_sub(read).ok_or_else(|| io::Error::other("it unpacks to more than allowed"))?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn tar_of(name: &str, bytes: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, name, bytes).unwrap();
        builder.into_inner().unwrap()
    }

    fn deb_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut deb = b"!<arch>\n".to_vec();
        for (name, bytes) in members {
            writeln!(deb, "{name:<16}{:<32}{:<10}`", 0, bytes.len()).unwrap();
            deb.extend(*bytes);
            deb.resize(deb.len().next_multiple_of(2), b'\n');
        }
        deb
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn small() -> Vec<u8> {
        let control = gzip(&tar_of("control", b"Package: a\n"));
        deb_of(&[
            ("debian-binary", b"2.0\n"),
            ("_x", b"odd"),
            ("control.tar.gz", &control),
            ("data.tar.xz", &xz(&tar_of("a", b"hello"))),
        ])
    }

    #[test]
    fn reads_what_debs_have() {
        let deb = small();
        let (control, mut data) = open(deb.as_slice()).unwrap();
        assert_eq!(
            control,
            [ControlFile { name: "control".into(), mode: 0o755, bytes: b"Package: a\n".to_vec() }]
        );
        let mut bytes = Vec::new();
        data.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, tar_of("a", b"hello"));
    }

    #[test]
    fn says_what_is_wrong() {
        let control = tar_of("control", b"Package: a\n");
        let error = |deb: &[u8]| open(deb).map(drop).unwrap_err().to_string();
        assert!(error(b"hello, world").contains("no ar archive"));
        assert!(error(&deb_of(&[("debian-binary", b"2.0\n")])).contains("no data part"));
        assert!(error(&deb_of(&[("data.tar", b"")])).contains("before the control part"));
        assert!(error(&deb_of(&[("control.tar.lz", &control)])).contains("compression is not known"));
        assert!(error(&deb_of(&[("control.tar", &tar_of("x/y", b""))])).contains("strange name"));
        assert!(error(&deb_of(&[("control.tar", &tar_of("postinst", b""))])).contains("no control file"));
    }

    #[test]
    fn bombs_end() {
        let bomb = xz(&vec![0; 4 << 20]);
        assert!(bomb.len() < 10_000);
        assert!(matches!(unxz(bomb.as_slice(), 1 << 20), Err(Error::TooLarge(_))));
        assert_eq!(unxz(bomb.as_slice(), 4 << 20).unwrap().len(), 4 << 20);
        let control = gzip(&tar_of("control", &vec![b' '; usize::try_from(CONTROL_BYTES_MAX).unwrap()]));
        assert!(open(deb_of(&[("control.tar.gz", &control)]).as_slice()).is_err());
        let mut bounded = Bounded { inner: io::repeat(0), left: 1000 };
        assert!(io::copy(&mut bounded, &mut io::sink()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(cut in 0usize..700, place in 0usize..700, value: u8) {
            let mut deb = small();
            let last = deb.len() - 1;
            deb[place.min(last)] = value;
            deb.truncate(cut.min(last).max(1));
            if let Ok((_, data)) = open(deb.as_slice()) {
                let _ = io::copy(&mut data.take(1 << 20), &mut io::sink());
            }
        }
    }
}
