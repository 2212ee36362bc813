//! Bringing the content of one file into the cache, whole and proven or not at all.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use ureq::http::{Response, StatusCode, header};

use super::cache::RepositoryCache;
use super::client::{Again, Answer, Client, Failure};
use super::{HubError, HubEvent, Watch};
use crate::tensors::hex;

/// A file of a commit as the hub describes it.
#[derive(Debug)]
pub(super) struct RemoteFile {
    pub name: String,
    /// Names the content.
    pub etag: String,
    /// Bytes.
    pub size: u64,
}

/// Where a file belongs and how far all of them are.
pub(super) struct Transfer<'a> {
    pub client: &'a Client<'a>,
    pub cache: &'a RepositoryCache,
    pub repository: &'a str,
    pub commit: &'a str,
    /// Bytes of the files before this one.
    pub before: u64,
    /// Bytes of all files.
    pub total: u64,
}

impl Transfer<'_> {
    /// Makes `file` part of the snapshot, from the cache if its content is there under another commit.
    ///
    /// What arrives is kept in `ETAG.incomplete` until it is whole. An interrupted transfer is taken up where it broke
    /// off only if the ETag is a SHA-256, since only then is what was glued together proven in the end.
    pub(super) fn run(&self, file: &RemoteFile, watch: Watch<'_>) -> Result<(), HubError> {
        let blob = self.cache.blob(&file.etag);
        let dir = blob.parent().unwrap_or(&blob);
        fs::create_dir_all(dir).map_err(HubError::io("create", dir))?;
        let lock = self.cache.lock(&file.etag, &file.name, watch)?;
        // A content of another length is the remainder of an accident.
        if !fs::metadata(&blob).is_ok_and(|found| found.len() == file.size) {
            let partial = dir.join(format!("{}.incomplete", file.etag));
            self.fetch_proven(file, &partial, watch)?;
            fs::rename(&partial, &blob).map_err(HubError::io("create", &blob))?;
        }
        self.cache.link(self.commit, &file.name, &file.etag)?;
        drop(lock);
        Ok(())
    }

    /// Fetches and checks; what was continued and is wrong is fetched once more from the start.
    fn fetch_proven(&self, file: &RemoteFile, partial: &Path, watch: Watch<'_>) -> Result<(), HubError> {
        let mut first = true;
        loop {
            let mut continued = false;
            self.client.retrying(watch, |watch, reached| self.fetch(file, partial, &mut continued, watch, reached))?;
            let Err(error) = self.prove(file, partial) else { return Ok(()) };
            fs::remove_file(partial).map_err(HubError::io("delete", partial))?;
            if !(first && continued) {
                return Err(error);
            }
            first = false;
        }
    }

    fn fetch(
        &self,
        file: &RemoteFile,
        partial: &Path,
        continued: &mut bool,
        watch: Watch<'_>,
        reached: &mut u64,
    ) -> Result<(), Failure> {
        let have = fs::metadata(partial).map_or(0, |partial| partial.len());
        let mut start = if is_sha256(&file.etag) && have <= file.size { have } else { 0 };
        *continued |= start > 0;
        if start > 0 && start == file.size {
            return Ok(());
        }
        let answer = self.client.content(self.commit, &file.name, start)?;
        self.check_unchanged(file, &answer)?;
        if answer.response.status() == StatusCode::OK {
            start = 0;
        } else if !continues(&answer.response, start, file.size) {
            if have > 0 {
                // What is there is of no use for this host.
                fs::remove_file(partial).map_err(HubError::io("delete", partial))?;
            }
            let problem = format!("the answer is another part of `{}` than was asked for", file.name);
            return Err(Failure { error: HubError::Answer { url: answer.url, problem }, again: Again::Soon });
        }
        let output = File::options().create(true).truncate(false).write(true).open(partial);
        let mut output = output.map_err(HubError::io("write", partial))?;
        self.receive(file, answer, (&mut output, partial), start, watch, reached)?;
        output.sync_all().map_err(HubError::io("write", partial)).map_err(Failure::from)
    }

    /// Writes an answer from byte `start` on.
    fn receive(
        &self,
        file: &RemoteFile,
        answer: Answer,
        (output, partial): (&mut File, &Path),
        start: u64,
        watch: Watch<'_>,
        reached: &mut u64,
    ) -> Result<(), Failure> {
        let write = |result: io::Result<()>| result.map_err(HubError::io("write", partial));
        write(output.set_len(start).and_then(|()| output.seek(SeekFrom::Start(start)).map(drop)))?;
        let mut done = start;
        let mut reader = answer.response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 17];
        loop {
            watch(HubEvent::Transfer { file: &file.name, done: self.before + done, total: self.total });
            let count = match reader.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.client.unread(&answer.url, error.into())),
            };
            if count == 0 {
                break;
            }
            done += count as u64;
            if done > file.size {
                break;
            }
            write(output.write_all(&buffer[..count]))?;
            *reached = (*reached).max(done);
        }
        if done == file.size {
            return Ok(());
        }
        // An answer without a length ends like one that is cut off: more may come next time. Too much never gets right.
        let again = if done < file.size { Again::Soon } else { Again::Never };
        if done > file.size {
            fs::remove_file(partial).map_err(HubError::io("delete", partial))?;
        }
        let (repository, name) = (self.repository.to_owned(), file.name.clone());
        Err(Failure { error: HubError::Size { repository, file: name, expected: file.size, found: done }, again })
    }

    /// Refuses an answer about another content than the one that was described.
    fn check_unchanged(&self, file: &RemoteFile, answer: &Answer) -> Result<(), Failure> {
        match &answer.headers.etag {
            Some(etag) if *etag != file.etag => {
                let problem = format!("`{}` changed while it was fetched: try again", file.name);
                Err(HubError::Answer { url: answer.url.clone(), problem }.into())
            }
            _ => Ok(()),
        }
    }

    /// Checks length and SHA-256 of what is on the disk.
    fn prove(&self, file: &RemoteFile, partial: &Path) -> Result<(), HubError> {
        let (repository, name) = (self.repository.to_owned(), file.name.clone());
        let mut input = File::open(partial).map_err(HubError::io("open", partial))?;
        let found = input.metadata().map_err(HubError::io("read", partial))?.len();
        if found != file.size {
            return Err(HubError::Size { repository, file: name, expected: file.size, found });
        }
        if !is_sha256(&file.etag) {
            return Ok(());
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match input.read(&mut buffer).map_err(HubError::io("read", partial))? {
                0 => break,
                count => hash.update(&buffer[..count]),
            }
        }
        let found = hex(&hash.finalize());
        if found == file.etag {
            return Ok(());
        }
        Err(HubError::Hash { repository, file: name, expected: file.etag.clone(), found })
    }
}

/// Large files are named by the SHA-256 of their content, small ones by that of git, which is not checked.
fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether an answer is the rest of `size` bytes from `start` on.
fn continues<T>(response: &Response<T>, start: u64, size: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let expected = format!("bytes {start}-{}/{size}", size.saturating_sub(1));
    response.status() == StatusCode::PARTIAL_CONTENT && range == Some(expected.as_str())
}
