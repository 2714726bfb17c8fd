//! The compressions a Linux kernel's payload comes in (Linux `lib/decompress*.c`, `scripts/Makefile.lib`).
//!
//! Decompressing on the host takes a tenth of a second where the guest's own decompressor would execute up to 700
//! million instructions. Output is bounded by the caller, so a bomb costs at most the guest's memory.

use super::Error;
use super::bytes::Bytes;
use std::io::Read;

/// How a payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: an ELF file.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// The .xz container.
    Xz,
    /// The older .lzma ("alone") container.
    Lzma,
    /// Zstandard (RFC 8878).
    Zstd,
    /// LZ4's legacy frame, which is what kernels use.
    Lz4,
    /// bzip2, lzo and what may come: the guest must decompress it itself.
    Other,
}

impl Compression {
    /// Tells the compression by its first bytes.
    pub fn detect(payload: &[u8]) -> Self {
        match payload {
            [0x7f, b'E', b'L', b'F', ..] => Self::None,
            [0x1f, 0x8b | 0x9e, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x5d, 0, 0, ..] => Self::Lzma,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            _ => Self::Other,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "ELF",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Other => "unknown",
        }
    }
}

/// Decompresses `payload`; a result of more than `max` bytes is cut off just behind `max`. The last four bytes of
/// most payloads are the size of the result, appended by the kernel's build; no format but LZ4's minds them.
pub fn decompress(payload: &[u8], compression: Compression, max: u64) -> Result<Vec<u8>, Error> {
    let failed = |why: String| Error::Payload { compression: compression.name(), why };
    let out = match compression {
        Compression::None => Ok(payload.to_vec()),
        Compression::Gzip => drain(flate2::read::GzDecoder::new(payload), payload, max),
        Compression::Xz => drain(lzma_rust2::XzReader::new(payload, false), payload, max),
        Compression::Lzma => lzma_rust2::LzmaReader::new_mem_limit(payload, LZMA_MEMORY_KIB_MAX, None)
            .and_then(|reader| drain(reader, payload, max)),
        Compression::Zstd => {
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(payload, ZSTD_WINDOW_MAX)
                .map_err(std::io::Error::other)
                .and_then(|reader| drain(reader, payload, max))
        }
        Compression::Lz4 => return lz4_legacy(payload, max).map_err(|why| failed(why.into())),
        Compression::Other => return Err(failed("yado cannot decompress this format".into())),
    };
    out.map_err(|error| failed(error.to_string()))
}

/// What an .lzma header may ask of the host, in KiB.
const LZMA_MEMORY_KIB_MAX: u32 = 256 << 10;
/// What a zstd frame may ask of the host, in bytes: kernels are packed with up to 128 MiB windows.
const ZSTD_WINDOW_MAX: u64 = 128 << 20;

/// Reads to the end, one byte more than `max` at most. `payload` may end with the size to expect.
fn drain(from: impl Read, payload: &[u8], max: u64) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(expected(payload, max));
    from.take(max.saturating_add(1)).read_to_end(&mut out)?;
    Ok(out)
}

/// The size that the kernel's build appends, if it is believable: room is made for it at once.
fn expected(payload: &[u8], max: u64) -> usize {
    let at = (payload.len() as u64).saturating_sub(4);
    let size = Bytes(payload).u32(at).map_or(0, u64::from);
    let believable = size <= max && size <= (payload.len() as u64).saturating_mul(16);
    if believable { usize::try_from(size).unwrap_or(0) } else { 0 }
}

/// LZ4's legacy frame: after the magic, blocks of at most 8 MiB, each behind its compressed size.
fn lz4_legacy(payload: &[u8], max: u64) -> Result<Vec<u8>, &'static str> {
    const BLOCK: usize = 8 << 20;
    let bytes = Bytes(payload);
    let end = u64::try_from(payload.len()).unwrap_or(0);
    let (mut at, mut out) = (4u64, Vec::with_capacity(expected(payload, max)));
    let mut block = vec![0; BLOCK];
    while let Some(len) = bytes.u32(at) {
        at = at.saturating_add(4);
        // The size that the kernel's build appends looks like one more block that is not there.
        if at == end || len == 0 {
            break;
        }
        let packed = bytes.slice(at, len.into()).ok_or("a block is cut off")?;
        let len_out =
            lz4_flex::block::decompress_into(packed, &mut block).map_err(|_| "a block is corrupt")?;
        out.extend_from_slice(block.get(..len_out).unwrap_or_default());
        if u64::try_from(out.len()).unwrap_or(u64::MAX) > max {
            return Ok(out);
        }
        at = at.saturating_add(len.into());
    }
    Ok(out)
}
